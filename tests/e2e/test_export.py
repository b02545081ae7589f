"""`llava-cl export`: other programs load what it writes and answer as the run did."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from llava_cl import cli
from llava_cl.cli import app
from llava_cl.config import ModelConfig
from llava_cl.data import encode_prompt, load_image, preprocess_image
from llava_cl.errors import InputError
from llava_cl.models import family
from llava_cl.pipeline.export import export
from llava_cl.store import RunDirectory
from runs import run_here, tiny_config
from tiny import build_model, run_content
from tiny_samples import IMAGE_TOKEN_ID, IMAGE_TOKENS


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two tasks, whose updates are large enough to change answers."""
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(folder, run_content(tiny_run), "training.epochs=4", "training.learning_rate=0.02")
    run_here(config, folder / "run")
    return folder / "run"


def _answers(model: Any, tokenizer: Any, data: Path, task: str) -> list[str]:
    """The model's greedy answers to a task's questions, one at a time, with transformers alone."""
    answers = []
    for record in json.loads((data / task / "test.json").read_text()):
        ids = encode_prompt(record["text"], tokenizer, image_token_id=IMAGE_TOKEN_ID, num_image_tokens=IMAGE_TOKENS)
        image = load_image(record["image"], data / "images")
        pixels = torch.from_numpy(preprocess_image(image, size=16))[None]
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        new = model.generate(**batch, pixel_values=pixels, max_new_tokens=3, do_sample=False)[0, len(ids) :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def _recorded(run: Path, stage: str, task: str) -> list[str]:
    lines = (run / "stages" / stage / "predictions" / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_plain_transformers_answers_as_the_run_did(run: Path, tiny_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--stage", "2", "--to", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = family(ModelConfig(path=tiny_run / "model")).tokenizer()
    for task in ("Colour", "Tone"):
        answers = _answers(model, tokenizer, tiny_run / "data", task)
        assert answers == _recorded(run, "02-Tone", task)
        assert answers != _recorded(run, "00-base", task)


def test_an_adapter_over_the_base_gives_the_same_model(run: Path, tiny_run: Path, tmp_path: Path) -> None:
    export(run, 2, tmp_path / "peft", "peft")
    export(run, 2, tmp_path / "hf", "hf")
    base = LlavaForConditionalGeneration.from_pretrained(tiny_run / "model")
    merged: Any = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()
    whole = dict(LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").named_parameters())
    start = dict(LlavaForConditionalGeneration.from_pretrained(tiny_run / "model").named_parameters())
    changed = 0
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, whole[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(whole[name], start[name])
    assert changed == 14 + 4


def test_the_authors_layout_holds_the_same_model(run: Path, tmp_path: Path) -> None:
    export(run, 1, tmp_path / "llava", "llava")
    export(run, 1, tmp_path / "hf", "hf")
    models = [
        family(ModelConfig(path=tmp_path / name, dtype="float32")).load(torch.device("cpu")) for name in ("llava", "hf")
    ]
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    for (left, a), (right, b) in pairs:
        assert left == right
        assert torch.equal(a, b), left


@pytest.mark.parametrize(
    ("stage", "layout", "named"),
    [(3, "hf", "the stages are 0"), (1, "gguf", "the llava family has hf, llava, peft"), (0, "peft", "has no adapter")],
)
def test_what_cannot_be_exported_is_told(run: Path, stage: int, layout: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        export(run, stage, tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_refused(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    content = RunDirectory(moved, ()).recorded()
    content["config"]["model"]["path"] = str(build_model(tmp_path / "other", seed=9))
    RunDirectory(moved, ()).record(content)
    with pytest.raises(InputError, match="is not the base model"):
        export(moved, 1, tmp_path / "out", "hf")


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists; give a new folder"):
        export(run, 1, tmp_path / "out", "hf")


def test_a_stage_that_is_not_trained_is_told(tiny_run: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, run_content(tiny_run))
    RunDirectory(tmp_path / "run", ()).record({"config": config.model_dump(mode="json")})
    with pytest.raises(InputError, match="is trained up to stage 0"):
        export(tmp_path / "run", 1, tmp_path / "out", "hf")
    with pytest.raises(InputError, match=r"holds no run\.json"):
        export(tmp_path, 1, tmp_path / "out", "hf")


def test_an_export_keeps_the_precision_of_the_base(tiny_run: Path, tmp_path: Path) -> None:
    content = run_content(tiny_run)
    half = LlavaForConditionalGeneration.from_pretrained(tiny_run / "model", dtype=torch.float16)
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    half.save_pretrained(tmp_path / "model")
    content["model"] = {**content["model"], "path": str(tmp_path / "model"), "dtype": "bfloat16"}
    content["evaluation"] = {**content["evaluation"], "zero_shot": False}
    execute_base = tiny_config(tmp_path, content, "training.projector_learning_rate=null")
    run_here(execute_base, tmp_path / "run", until=0)
    export(tmp_path / "run", 0, tmp_path / "out", "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float16 and torch.equal(tensor, before[key]) for key, tensor in after.items())


def test_sampling_settings_beside_greedy_decoding_do_not_stop_an_export(
    run: Path, tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"
    content = json.loads(settings.read_text()) if settings.is_file() else {}
    settings.write_text(json.dumps({**content, "temperature": 0.9, "top_p": 0.6, "max_length": 77}))
    config = family(ModelConfig(path=tmp_path / "model", dtype="float32"))
    (tmp_path / "out").mkdir()
    config.save(config.load(torch.device("cpu")), tmp_path / "out", "hf")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "temperature" not in written and written["max_length"] == 77


def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("llava_cl.pipeline.export.combine", broken)
    with pytest.raises(ValueError, match="no such thing"):
        export(run, 1, tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["hf", "llava", "peft"])
def test_every_export_has_a_model_card(layout: str, run: Path, tiny_run: Path, tmp_path: Path) -> None:
    export(run, 1, tmp_path / "out", layout)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == {"hf": "transformers", "peft": "peft"}.get(layout)
    assert {"continual-learning", "keeplora", "tiny"} <= set(card.data.tags)
    assert card.data.license is None and "Add `license:`" in card.text
    manifest, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    assert ["base model", "`model`"] in cells
    assert ["its fingerprint (SHA-256)", f"`{manifest['base']['sha256']}`"] in cells
    assert ["tasks learned, in order", "`Colour`"] in cells
    assert ["method", "`keeplora`"] in cells
    assert ["base model", *(f"{value:.2f}" for value in metrics["base_row"])] in cells
    assert ["after `Colour`", *(f"{value:.2f}" for value in metrics["matrix"][0])] in cells
    assert not [row for row in cells if row[0] == "after `Tone`"]
    hashes = {row[0].strip("`"): row[1].strip("`") for row in cells if len(row) == 2}
    assert manifest["data"].items() <= hashes.items()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.name != "README.md"]
    for file in files:
        name = file.relative_to(tmp_path / "out").as_posix()
        assert hashes[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(tiny_run) not in card.content and str(tmp_path) not in card.content


def test_the_card_of_the_last_stage_has_the_metrics(run: Path, tmp_path: Path) -> None:
    export(run, 2, tmp_path / "out", "peft")
    card = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((run / "metrics.json").read_text())["summary"]
    known = {name: value for name, value in summary.items() if value is not None}
    assert f"| {' | '.join(known)} |" in card
    assert f"| {' | '.join(f'{value:.2f}' for value in known.values())} |" in card


@pytest.mark.parametrize("layout", ["hf", "llava", "peft"])
def test_an_export_to_a_full_disk_is_one_message(
    run: Path,
    small_file_system: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    filler, folder = small_file_system / "filler", small_file_system / "out"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 8192)
    arguments = ["export", str(run), "--stage", "2", "--to", str(folder), "--format", layout]
    monkeypatch.setattr("sys.argv", ["llava-cl", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "No space left on device" in said
    assert said.startswith(f"error: {small_file_system}") and said.count("\n") == 1
    assert list(small_file_system.iterdir()) == [filler]
