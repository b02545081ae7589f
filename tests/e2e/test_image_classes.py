"""A class-incremental run of a ViT, from its data to predictions, exports and reports."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification, ViTModel
from typer.testing import CliRunner

import fake_torchvision
import tiny
import tiny_clip
import tiny_vit
from llava_cl.cli import app
from llava_cl.config import RunConfig, load_config
from llava_cl.distributed import World
from llava_cl.errors import InputError
from llava_cl.methods import LayerStatistics
from llava_cl.methods.inflora import InfLora
from llava_cl.models import family
from llava_cl.pipeline import stage as stages
from llava_cl.pipeline import steps
from llava_cl.pipeline.export import export
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.planning import Shapes, predict_disk
from llava_cl.pipeline.preflight import check_plan, check_setup
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.samples import samples_of
from llava_cl.pipeline.task_data import read_questions
from llava_cl.report import write_report
from llava_cl.store import RunDirectory, load_tensors_metadata
from llava_cl.subspace import minor_basis
from runs import Silent, result_hashes, run_here, tiny_config, write_config

TASKS = ("T1", "T2", "T3")
PREFIX = "base_model.model."
STEPS = {"initialise": "initialise", "train": "learn", "protect": "protect", "evaluate": "evaluate"}


class Killed(BaseException):
    """Stands for a kill signal: nothing in the package may catch it."""


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """A run collects garbage at every step; it need not walk over all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its pictures; read it, never write to it."""
    place = tmp_path_factory.mktemp("colours")
    tiny_vit.run_content(place)
    return place


def _config(folder: Path, method: str = "splitlora", *overrides: str) -> RunConfig:
    return tiny_config(folder, tiny_vit.run_content(folder, method), *overrides)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run of SplitLoRA, the method that keeps most; read it, never write to it."""
    run_here(_config(folder), folder / "run")
    return folder / "run"


def _stage(run: Path, number: int) -> Path:
    return next(run.glob(f"stages/{number:02d}-*"))


def _predictions(run: Path, stage: int, task: str) -> dict[str, str]:
    lines = (_stage(run, stage) / "predictions" / f"{task}.jsonl").read_text().splitlines()
    return {row["question_id"]: row["text"] for row in map(json.loads, lines)}


def _adapter(run: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(_stage(run, stage) / "adapter" / "adapter_model.safetensors")


def _layers(run: Path, stage: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> the stored A and B."""
    tensors = _adapter(run, stage)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix(PREFIX): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in sorted(names)
    }


def _plain(folder: Path, run: Path, stage: int) -> ViTModel:
    """The base with the stored updates of a run, by transformers alone; alpha over rank is 1."""
    model = ViTModel.from_pretrained(folder / "model", add_pooling_layer=False).eval()
    with torch.no_grad():
        for number in range(1, stage + 1):
            for name, (a, b) in _layers(run, number).items():
                model.get_submodule(name.removeprefix("vit.")).weight.add_(b @ a)
    return model


def _pixels(folder: Path, split: str, classes: list[str]) -> tuple[list[str], torch.Tensor]:
    """Names and pixels of pictures of 20 x 16, made 16 x 16 as a short side of 16 and a cut in the middle do."""
    names = [f"{name}/{file.name}" for name in classes for file in sorted((folder / "data" / split / name).iterdir())]
    arrays = [np.asarray(Image.open(folder / "data" / split / name))[:, 2:18] / 255 for name in names]
    return names, torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).float() * 2 - 1


def _classes(task: str) -> list[str]:
    number = TASKS.index(task)
    return list(tiny_vit.ORDER[2 * number :][:2])


def _job(folder: Path, run: Path) -> Job:
    return Job(_config(folder), RunDirectory(run, TASKS), World(0, 1, torch.device("cpu")), ProgressWriter(None))


def test_after_each_stage_the_tasks_seen_so_far_are_evaluated(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    matrix = metrics["matrix"]
    assert [[value is not None for value in row] for row in matrix] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    for stage in (1, 2, 3):
        answered = sorted(file.stem for file in (_stage(run, stage) / "predictions").iterdir())
        assert answered == list(TASKS[:stage])
        scores = json.loads((_stage(run, stage) / "scores.json").read_text())["scores"]
        for number, task in enumerate(TASKS[:stage]):
            right = [text == name.partition("/")[0] for name, text in _predictions(run, stage, task).items()]
            assert len(right) == 8
            assert scores[task]["score"] == matrix[stage - 1][number] == pytest.approx(100 * sum(right) / 8)
    assert not (_stage(run, 0) / "predictions").exists()
    rows = (run / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[1].count(",") == 3
    assert rows[1].endswith(",,")


def test_the_summary_is_that_of_class_incremental_learning(run: Path) -> None:
    """Tasks have equally many pictures, so that the accuracy over all seen classes is a plain mean."""
    metrics = json.loads((run / "metrics.json").read_text())
    seen = [sum(row[: stage + 1]) / (stage + 1) for stage, row in enumerate(metrics["matrix"])]
    assert metrics["summary"]["LastAll"] == pytest.approx(seen[-1])
    assert metrics["summary"]["AAA"] == pytest.approx(sum(seen) / 3)
    assert metrics["majority"].keys() == set(TASKS)


def test_predictions_are_classes_seen_so_far(run: Path) -> None:
    chosen: set[str] = set()
    for stage in (1, 2, 3):
        seen = {name for task in TASKS[:stage] for name in _classes(task)}
        for task in TASKS[:stage]:
            predictions = _predictions(run, stage, task)
            assert set(predictions.values()) <= seen
            assert {name.partition("/")[0] for name in predictions} == set(_classes(task))
            chosen |= set(predictions.values())
    assert len(chosen) > 2


def test_heads_that_have_not_learned_are_never_chosen(folder: Path, run: Path) -> None:
    """Their scores are zeros, which may be more than all scores of the others."""
    job = _job(folder, run)
    model: Any = job.load_model(1)
    with torch.no_grad():
        model.heads[0].bias.fill_(-100)
    task = job.config.benchmark.tasks[0]
    answers = job.samples.answer(model, 1, task, read_questions(job.config, task), job.world, lambda done, total: None)
    assert len(answers) == 8
    assert set(answers) <= set(_classes("T1"))


@pytest.mark.parametrize("stage", [1, 3])
def test_plain_transformers_predicts_the_same(folder: Path, run: Path, tmp_path: Path, stage: int) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--stage", str(stage), "--to", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    exported = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    model = _plain(folder, run, stage)
    heads = [_adapter(run, number) for number in range(1, stage + 1)]
    classes = [name for task in TASKS[:stage] for name in _classes(task)]
    for task in TASKS[:stage]:
        names, pixels = _pixels(folder, "val", _classes(task))
        with torch.no_grad():
            features = model(pixel_values=pixels).last_hidden_state[:, 0]
            scores = torch.cat(
                [
                    features @ head[f"{PREFIX}heads.{number}.weight"].T + head[f"{PREFIX}heads.{number}.bias"]
                    for number, head in enumerate(heads)
                ],
                dim=1,
            )
            torch.testing.assert_close(exported(pixels).logits, scores, rtol=0, atol=1e-4)
        chosen = [classes[best] for best in scores.argmax(dim=1).tolist()]
        assert _predictions(run, stage, task) == dict(zip(names, chosen, strict=True))


def test_a_stage_trains_its_own_head_and_leaves_the_earlier_ones(folder: Path, run: Path) -> None:
    heads: dict[str, torch.Tensor] = {}
    for stage in (1, 2, 3):
        own = {key: value for key, value in _adapter(run, stage).items() if "heads" in key.split(".")}
        assert own.keys() == {f"{PREFIX}heads.{stage - 1}.weight", f"{PREFIX}heads.{stage - 1}.bias"}
        assert all(value.any() for value in own.values())
        heads.update(own)
    job = _job(folder, run)
    last = dict(job.load_model(3).named_parameters())
    base = dict(job.load_model(0).named_parameters())
    for key, value in heads.items():
        assert torch.equal(last[key.removeprefix(PREFIX)], value), key
    for name, parameter in base.items():
        if name.startswith("vit."):
            adapted = name.removesuffix(".weight") in _layers(run, 1)
            assert torch.equal(last[name], parameter) != adapted, name
        else:
            assert not parameter.any()


def test_the_running_moments_are_over_all_tasks_each_by_its_own_model(folder: Path, run: Path) -> None:
    sums, tokens = [torch.zeros(24, 24, dtype=torch.float64) for _ in range(2)], 0
    for stage, task in enumerate(TASKS, start=1):
        model = _plain(folder, run, stage)
        with torch.no_grad():
            states = model(pixel_values=_pixels(folder, "train", _classes(task))[1], output_hidden_states=True)
            # What enters each block, as its keys and values read it.
            inputs = [
                layer.layernorm_before(x) for layer, x in zip(model.layers, states.hidden_states[:2], strict=True)
            ]
        for total, x in zip(sums, inputs, strict=True):
            flat = x.flatten(0, 1).double()
            total += flat.T @ flat
        tokens += inputs[0].shape[0] * inputs[0].shape[1]
        stored = [value for _, value in sorted(load_file(_stage(run, stage) / "moments.safetensors").items())]
        assert tokens == stage * 24 * 5
        assert len(stored) == 2
        for moment, total in zip(stored, sums, strict=True):
            assert (moment - total / tokens).norm() < 1e-5 * total.norm() / tokens


def test_the_first_a_is_random_and_later_ones_are_in_the_minor_space(run: Path) -> None:
    lengths = []
    for stage in (1, 2, 3):
        moments = load_file(_stage(run, max(stage - 1, 1)) / "moments.safetensors")
        for name, (a, b) in _layers(run, stage).items():
            assert b.any()
            minor = minor_basis(moments[f"{name.rpartition('.')[0]}.input"], max(stage - 1, 1), 20.0)
            outside = (a - a @ minor @ minor.T).norm() / a.norm()
            assert outside < 1e-5 if stage > 1 else outside > 0.05
            lengths.append(float(a.norm()))
            if stage == 1:
                assert a.abs().max() <= 24**-0.5
    for stage in (2, 3):
        # A usual A of 2 x 24 entries has the norm sqrt(2 / 3), to about a tenth.
        mean = sum(lengths[4 * (stage - 1) : 4 * stage]) / 4
        assert mean == pytest.approx((2 / 3) ** 0.5 / stage, rel=0.2)


def test_the_learning_rate_falls_at_the_milestones(run: Path) -> None:
    rows = [json.loads(line) for line in (_stage(run, 2) / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    rates = [row["learning_rate"] for row in rows]
    assert rates == pytest.approx([5e-3] * 6 + [5e-4] * 3 + [5e-5] * 3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_finished_run_does_nothing_again(folder: Path, run: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in run.glob("stages/**/*.safetensors")}
    watcher = Silent()
    run_here(_config(folder), run, watcher)
    assert watcher.begun == []
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_two_runs_end_with_the_same_bytes(folder: Path, run: Path, tmp_path: Path) -> None:
    run_here(_config(folder), tmp_path / "run")
    assert result_hashes(tmp_path / "run") == result_hashes(run)
    assert sum("moments" in name for name in result_hashes(run)) == 3


def _first_stage_of(run: Path, output: Path) -> Path:
    """A run directory with a finished run's stages up to the first."""
    (output / "stages").mkdir(parents=True)
    shutil.copy(run / "run.json", output)
    for stage in (0, 1):
        shutil.copytree(_stage(run, stage), output / "stages" / _stage(run, stage).name)
    return output


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_run_ends_with_the_same_bytes(
    folder: Path, run: Path, step: str, when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`before` = files of the step are not yet written; `after` = written, but not recorded."""
    output = _first_stage_of(run, tmp_path / "run")
    original = getattr(steps, STEPS[step])

    def interrupted(*arguments: Any) -> list[Path]:
        if when == "after":
            original(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(stages._LEARNING if step in stages._LEARNING else stages._EVALUATION, step, interrupted)
        with pytest.raises(Killed):
            run_here(_config(folder), output, until=2)
    run_here(_config(folder), output, until=2)
    expected = {name: digest for name, digest in result_hashes(run).items() if "03-T3" not in name}
    assert result_hashes(output) == expected


def test_what_changes_speed_or_memory_alone_changes_no_answer(folder: Path, run: Path, tmp_path: Path) -> None:
    changes = ("training.micro_batch=8", "measurement.batch_size=5", "evaluation.batch_size=3")
    run_here(_config(folder, "splitlora", *changes, "training.gradient_checkpointing=true"), tmp_path / "run", until=2)
    for stage in (1, 2):
        for key, value in _adapter(tmp_path / "run", stage).items():
            torch.testing.assert_close(value, _adapter(run, stage)[key], rtol=0, atol=1e-5)
        for task in TASKS[:stage]:
            assert _predictions(tmp_path / "run", stage, task) == _predictions(run, stage, task)


@pytest.mark.e2e
@pytest.mark.distributed
def test_two_ranks_over_the_command_line_equal_one_process(folder: Path, run: Path, tmp_path: Path) -> None:
    """The second stage, which starts from what one process left of the first."""
    output = _first_stage_of(run, tmp_path / "run")
    config = write_config(tmp_path, tiny_vit.run_content(folder, "splitlora"))
    arguments = ["run", str(config), "--output", str(output), "--nproc", "2", "--until", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "llava_cl.cli", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for key, value in _adapter(output, 2).items():
        torch.testing.assert_close(value, _adapter(run, 2)[key], rtol=0, atol=1e-5)
    ours, theirs = (load_file(_stage(place, 2) / "moments.safetensors") for place in (output, run))
    for key, value in ours.items():
        assert (value - theirs[key]).norm() < 1e-5 * theirs[key].norm(), key
    for task in ("T1", "T2"):
        assert _predictions(output, 2, task) == _predictions(run, 2, task)
    assert (output / "report" / "index.html").is_file()


def test_pictures_are_augmented_anew_in_every_epoch_of_training_alone(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = fake_torchvision.install(monkeypatch)
    for name in ("first", "second"):
        run_here(_config(folder, "splitlora", "images.augment=imagenet"), tmp_path / name, until=1)
    assert result_hashes(tmp_path / "first") == result_hashes(tmp_path / "second")
    seeds = [what[1] for what in listed if what[0] == "seed"]
    assert len(seeds) == 2 * len(set(seeds)) == 2 * 4 * 24
    ours, theirs = _layers(tmp_path / "first", 1), _layers(run, 1)
    assert all((ours[name][1] - b).abs().max() > 1e-4 for name, (_, b) in theirs.items())


def test_o_lora_lists_the_rows_of_every_a_and_is_penalised_for_them(folder: Path, tmp_path: Path) -> None:
    for weight in (0, 3):
        config = _config(folder, "olora", "training.epochs=1", f"method.options.penalty={weight}", "lora.rank=13")
        run_here(config, tmp_path / str(weight), until=2)
    free, held = tmp_path / "0", tmp_path / "3"
    for stage in (1, 2):
        added = load_file(_stage(held, stage) / "subspace.safetensors")
        for name, (a, b) in _layers(held, stage).items():
            assert torch.equal(added[name].T, a)
            assert b.any()
    # What the report says of them is of what they span.
    rows = {name: torch.cat([_layers(held, stage)[name][0] for stage in (1, 2)]) for name in _layers(held, 1)}
    for name, size in load_tensors_metadata(_stage(held, 2) / "subspace.safetensors")["layers"].items():
        assert size["columns"] == torch.linalg.matrix_rank(rows[name]) == size["of"] == 24 < len(rows[name])
        assert size["added"] == rows[name].shape[0] // 2
    # At the first step the loss is larger by the overlap of the starts with the A of the first task.
    starts = load_file(_stage(held, 2) / "initial_factors.safetensors")
    overlap = sum(float((starts[f"{name}.a"] @ a.T).abs().sum()) for name, (a, _) in _layers(held, 1).items())
    logs = [(_stage(run, 2) / "train_log.jsonl").read_text().splitlines() for run in (free, held)]
    losses = [json.loads(log[0])["loss"] for log in logs]
    assert overlap > 0.1
    assert losses[1] == pytest.approx(losses[0] + 3 * overlap, rel=1e-4)


def test_each_part_of_a_model_is_measured_for_its_own_options(tmp_path: Path) -> None:
    content = tiny_clip.run_content(tmp_path)
    content["method"] = {"name": "keeplora", "parts": {"vision": {"protect": "feature"}, "text": {"protect": None}}}
    run_here(tiny_config(tmp_path, content, "training.epochs=1"), tmp_path / "run", until=1)
    added = load_file(_stage(tmp_path / "run", 1) / "subspace.safetensors")
    grown = {name for name, columns in added.items() if columns.shape[1]}
    assert any("vision_model" in name.split(".") for name in grown)
    assert not any("text_model" in name.split(".") for name in grown)


def test_each_part_of_a_model_has_its_own_penalty(tmp_path: Path) -> None:
    losses = []
    for weight in (0, 3):
        content = tiny_clip.run_content(tmp_path)
        options = {"penalty": weight}
        content["method"] = {"name": "olora", "options": options, "parts": {"text": {"penalty": 0}}}
        output = tmp_path / str(weight)
        run_here(tiny_config(tmp_path, content, "training.epochs=1"), output, until=2)
        log = (_stage(output, 2) / "train_log.jsonl").read_text().splitlines()
        losses.append(json.loads(log[0])["loss"])
    starts = load_file(_stage(output, 2) / "initial_factors.safetensors")
    overlap = sum(
        float((starts[f"{name}.a"] @ a.T).abs().sum())
        for name, (a, _) in _layers(output, 1).items()
        if "vision_model" in name.split(".")
    )
    assert losses[1] == pytest.approx(losses[0] + 3 * overlap, rel=1e-4)


def test_inf_lora_learns_outside_what_is_protected(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, protect = [], InfLora.protect

    def spy(self: InfLora, statistics: LayerStatistics, basis: torch.Tensor | None) -> torch.Tensor | None:
        progress.append((statistics.tasks, statistics.stream))
        return protect(self, statistics, basis)

    monkeypatch.setattr(InfLora, "protect", spy)
    config = _config(folder, "inflora", "training.epochs=1")
    run_here(config, tmp_path / "run", until=2)
    # Its share rises over all tasks of the stream, however far it runs.
    assert dict.fromkeys(progress) == {(1, 3): None, (2, 3): None}
    assert len(config.benchmark.tasks) == 3
    protected = load_file(_stage(tmp_path / "run", 1) / "subspace.safetensors")
    for name, (a, _) in _layers(tmp_path / "run", 2).items():
        assert protected[name].shape[1] > 0
        assert (a @ protected[name]).abs().max() < 1e-5


def test_a_carried_adapter_is_one_adapter_over_the_base(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    metrics = run_here(_config(folder, "sequential", "method.options.carry=true", "training.epochs=1"), output, until=2)
    assert metrics["matrix"][1][1] is not None
    base, model = _plain(folder, output, 0), _plain(folder, output, 2)
    for name, (a, b) in _layers(output, 2).items():
        assert a.shape[0] == 4
        first_a, first_b = _layers(output, 1)[name]
        torch.testing.assert_close(a[2:], first_a, rtol=0, atol=0)
        torch.testing.assert_close(b[:, 2:], -first_b, rtol=0, atol=0)
        assert (a[:2] - first_a).abs().max() > 1e-4
        before, after = (each.get_submodule(name.removeprefix("vit.")).weight for each in (base, model))
        torch.testing.assert_close(after, before + b[:, :2] @ a[:2], rtol=0, atol=1e-6)


def test_the_report_and_the_scores_of_a_run_are_written(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert all(task in page for task in TASKS)
    shown = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--stage", "2", "--json"])
    assert shown.exit_code == 0, shown.output
    scores = json.loads(shown.stdout)["2"]
    assert scores.keys() == {"T1", "T2"}
    matrix = json.loads((run / "metrics.json").read_text())["matrix"]
    assert [scores[task]["score"] for task in ("T1", "T2")] == matrix[1][:2]


def test_one_adapter_over_the_base_holds_all_heads(folder: Path, run: Path, tmp_path: Path) -> None:
    export(run, 2, tmp_path / "peft", "peft")
    config = _config(folder)
    vit: Any = family(config.model)
    model = vit.load(torch.device("cpu"))
    vit.install(model, config.benchmark.tasks)
    loaded: Any = PeftModel.from_pretrained(model, tmp_path / "peft").eval().base_model.model
    pixels = _pixels(folder, "val", _classes("T1"))[1]
    with torch.no_grad():
        features = _plain(folder, run, 2)(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(loaded.features(pixels), features, rtol=0, atol=1e-5)
        for task in (1, 0):
            head = _adapter(run, task + 1)
            expected = features @ head[f"{PREFIX}heads.{task}.weight"].T + head[f"{PREFIX}heads.{task}.bias"]
            torch.testing.assert_close(vit.scorer(loaded, (task,))(pixels), expected, rtol=0, atol=1e-4)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copytree(folder / "model", tmp_path / "model")
    return tmp_path


def _checked(folder: Path, *overrides: str) -> str:
    """What `llava-cl check` finds wrong."""
    config = write_config(folder, tiny_vit.run_content(folder))
    options = [word for override in overrides for word in ("--set", override)]
    result = CliRunner().invoke(app, ["check", str(config), *options])
    assert result.exit_code != 0, result.output
    assert isinstance(result.exception, InputError), result.exception
    return str(result.exception)


def test_the_check_counts_pictures(damaged: Path) -> None:
    content = tiny_vit.run_content(damaged)
    content["benchmark"]["tasks"][1]["records"] = {"train": 24, "test": 9}
    result = CliRunner().invoke(app, ["check", str(write_config(damaged, content))])
    assert result.exit_code == 0, result.output
    assert "note: val: 8 records, 9 are expected" in result.output
    assert "note: train" not in result.output
    assert "all good" in result.output


def test_the_check_finds_all_that_is_wrong_with_the_classes(damaged: Path) -> None:
    shutil.rmtree(damaged / "data" / "val" / "red")
    shutil.rmtree(damaged / "data" / "train" / "white")
    (damaged / "data" / "train" / "white").mkdir()
    (damaged / "data" / "train" / "blue" / "notes.txt").write_text("")
    (damaged / "data" / "val" / "green" / "1.png").write_bytes(b"no picture")
    said = _checked(damaged)
    for place, reason in (
        ("val/red", "is no folder"),
        ("train/white", "holds no images"),
        ("train/blue", "notes.txt is no image"),
        ("val/green/1.png", "cannot be decoded"),
    ):
        assert any(place in line and reason in line for line in said.splitlines()), said


def test_a_missing_class_stops_a_run_before_anything_is_spent(damaged: Path) -> None:
    shutil.rmtree(damaged / "data" / "train" / "yellow")
    with pytest.raises(InputError, match=r"train/yellow: is no folder"):
        run_here(load_config(write_config(damaged, tiny_vit.run_content(damaged))), damaged / "run")
    assert not (damaged / "run" / "run.json").exists()


def test_the_check_finds_that_augmenting_needs_torchvision(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "torchvision" in _checked(damaged, "images.augment=cifar10")


def test_the_check_finds_pictures_that_become_smaller_than_the_models(damaged: Path) -> None:
    """The square of 16 would get black edges."""
    assert "images.resize" in _checked(damaged, "images.resize=8")


def test_a_model_that_does_not_fit_the_tasks_is_refused_with_one_message(
    folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    speaks = {**tiny_vit.run_content(folder), "model": tiny.run_content(tiny_run)["model"]}
    tells = {**tiny.run_content(tiny_run), "model": tiny_vit.run_content(folder)["model"]}
    del tells["training"]["projector_learning_rate"]
    for content, reason in (
        (speaks, "'llava' answers in words, but the tasks are classes of images"),
        (tells, "'vit' tells classes, but the tasks are instructions"),
    ):
        config = write_config(tmp_path, content)
        result = CliRunner().invoke(app, ["check", str(config)])
        assert isinstance(result.exception, InputError), result.exception
        assert len(result.exception.problems) == 1, result.exception
        assert reason in str(result.exception)
        with pytest.raises(InputError, match=reason) as error:
            run_here(load_config(config), tmp_path / "run")
        assert len(error.value.problems) == 1
        assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_of_heads_is_not_asked_for_classes_it_has_not_learned(folder: Path) -> None:
    with pytest.raises(InputError, match=r"benchmark\.evaluate: .*'vit' knows no class before .*'seen'"):
        check_setup(_config(folder, "splitlora", "benchmark.evaluate=all"), 1)


def test_an_option_that_does_not_fit_the_layers_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    output, square = {"weight_side": "output"}, ["q_proj"]
    config = tiny_config(tmp_path, tiny.run_content(tmp_path, method={"name": "keeplora", "options": output}))
    with pytest.raises(
        InputError, match=r"weight_side: 'output' is for square weights, but .*(gate|up)_proj is 40 x 24"
    ):
        check_setup(config, 1)
    check_setup(config.model_copy(update={"lora": config.lora.model_copy(update={"targets": square})}), 1)


def test_options_for_a_part_that_the_model_lacks_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"method\.parts: txt is no part of a model of family 'vit'"):
        check_setup(_config(folder, "splitlora", "method.parts={txt: {alpha: 2}}"), 1)
    with pytest.raises(InputError, match=r"method\.parts\.txt\.alpha of splitlora"):
        check_plan(_config(folder, "splitlora", "method.parts={txt: {alpha: -2}}"), 1)


def test_the_batch_of_measurement_is_part_of_a_run_whose_statistic_depends_on_it(tmp_path: Path) -> None:
    """Means over batches by place do, sums do not."""
    for protect in ("mean_feature", "feature"):
        content = tiny_clip.run_content(tmp_path)
        content["method"]["options"] = {"protect": protect}
        run_here(tiny_config(tmp_path, content), tmp_path / protect, until=0)
        other = tiny_config(tmp_path, content, "measurement.batch_size=9")
        if protect == "feature":
            run_here(other, tmp_path / protect, until=0)
        else:
            with pytest.raises(InputError, match=r"\+ identity\.measurement\.batch_size: 9"):
                run_here(other, tmp_path / protect, until=0)


def test_a_bfloat16_head_needs_fp32_copies_as_a_projector_does(folder: Path) -> None:
    """Without them its small steps are rounded away."""
    with pytest.raises(InputError, match=r"distributed\.deepspeed: .*bfloat16"):
        check_plan(_config(folder, "splitlora", "model.dtype=bfloat16"), 1)


@pytest.mark.parametrize("method", ["splitlora", "carry"])
def test_the_disk_that_is_asked_for_holds_the_run(folder: Path, run: Path, tmp_path: Path, method: str) -> None:
    output, config = run, _config(folder)
    if method == "carry":
        config = _config(folder, "sequential", "method.options.carry=true", "training.epochs=1")
        output = tmp_path / "run"
        run_here(config, output)
    written = sum(
        tensor.numel() * tensor.element_size()
        for file in output.glob("stages/**/*.safetensors")
        for tensor in load_file(file).values()
    )
    assert written <= sum(predict_disk(config, Shapes.of(config, samples_of(config))).values())
