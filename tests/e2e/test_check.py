"""`llava-cl check` shows what a run reads, counts it, and finds what is missing or does not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

import tiny
from llava_cl.cli import app
from llava_cl.config import load_config
from llava_cl.errors import InputError
from llava_cl.pipeline.orchestrator import Launch, execute
from llava_cl.pipeline.planning import Shapes, least_memory
from llava_cl.pipeline.preflight import check_memory
from llava_cl.pipeline.samples import samples_of
from llava_cl.pipeline.stage import stage_runner
from runs import Silent, run_here, tiny_config, write_config


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_files_and_counts_are_shown(folder: Path) -> None:
    content = tiny.run_content(folder)
    content["benchmark"]["tasks"][0]["records"] = {"train": 24, "test": 10}
    result = CliRunner().invoke(app, ["check", str(write_config(folder, content))])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any("train.json" in line for line in lines)
    for name, records in (("Colour/train.json", 24), ("Colour/test.json", 9), ("Tone/train.json", 24)):
        assert any(name in line and f" {records} " in line for line in lines), result.output
    assert "note: Colour/test.json: 9 records, 10 are expected" in result.output
    assert "Colour/train.json: 24" not in result.output
    assert "all good" in result.output


def test_missing_files_are_marked_in_the_tree(folder: Path) -> None:
    config = write_config(folder, tiny.run_content(folder))
    (folder / "data" / "Tone" / "test.json").unlink()
    result = CliRunner().invoke(app, ["check", str(config)])
    assert result.exit_code != 0
    assert isinstance(result.exception, InputError)
    assert str(folder / "data" / "Tone" / "test.json") in str(result.exception)
    assert next(line for line in result.output.splitlines() if "(missing)" in line).endswith("test.json (missing)")


def test_files_that_differ_in_capitals_alone_are_told(folder: Path) -> None:
    config = write_config(folder, tiny.run_content(folder))
    (folder / "data" / "Tone" / "test.json").rename(folder / "data" / "Tone" / "Test.json")
    (folder / "data" / "Colour").rename(folder / "data" / "colour")
    result = CliRunner().invoke(app, ["check", str(config)])
    assert isinstance(result.exception, InputError)
    for name, there in (("Tone/test.json", "Test.json"), ("Colour/train.json", "colour")):
        problem = f"{folder / 'data' / name}: is missing. Did you mean '{there}'?"
        assert problem in result.exception.problems


def test_expected_counts_are_no_part_of_a_run(folder: Path) -> None:
    content = tiny.run_content(folder)
    before = load_config(write_config(folder, content)).identity()
    content["benchmark"]["tasks"][0]["records"] = {"train": 24}
    content["benchmark"]["aliases"] = {"A": "B"}
    assert load_config(write_config(folder, content)).identity() == before


def test_a_folder_may_have_its_other_published_name(folder: Path) -> None:
    content = tiny.run_content(folder)
    content["benchmark"]["aliases"] = {"Tone": "Tone-2", "Colour": "Colour-2"}
    (folder / "data" / "Tone").rename(folder / "data" / "Tone-2")
    colour, tone = load_config(write_config(folder, content)).benchmark.tasks
    assert (colour.train, tone.train, tone.test) == ("Colour/train.json", "Tone-2/train.json", "Tone-2/test.json")


def test_too_little_memory_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(folder, tiny.run_content(folder))
    # By hand: 14 linears of the decoder (24 x 24 four times, 24 x 40 three times, two blocks), for each an fp32 sum.
    sums = 4 * 2 * (4 * 24 * 24 + 3 * 24 * 40)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model")
    weights = sum(parameter.numel() for parameter in model.parameters())
    # A is frozen: gate and up read 24 features, down 40; B of rank 4 writes them. Each number with its gradient and two
    # moments; the projector's weights are there a second time.
    shapes = Shapes.of(config, samples_of(config))
    frozen = 2 * 4 * (4 * 24 + 2 * 24 + 40)
    trained = 2 * 4 * (4 * 24 + 2 * 40 + 24) + (16 * 24 + 24) + (24 * 24 + 24)
    assert least_memory(config, shapes, 1) == 4 * weights + max(sums, 4 * frozen + 16 * trained)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=2 * least_memory(config, shapes, 2)))
    check_memory(config, 2)
    with pytest.raises(InputError, match="of 3 ranks on this machine has"):
        check_memory(config, 3)


def test_shared_memory_that_does_not_hold_the_batches_in_waiting_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank would end by a bus error otherwise, at the first batches that wait."""
    config = tiny_config(folder, tiny.run_content(folder), "training.workers=3")
    # Two ranks, three processes each, two batches each, of four images of 3 x 16 x 16 numbers in fp32.
    need = 2 * 3 * 2 * 4 * 3 * 16 * 16 * 4
    statvfs, free = os.statvfs, [need]

    def faked(path: object) -> os.statvfs_result:
        if str(path) != "/dev/shm":
            return statvfs(str(path))
        return os.statvfs_result((1, 1, 64 << 20, free[0], free[0], 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", faked)
    check_memory(config, 2)
    free[0] = need - 1
    with pytest.raises(InputError, match=r"training\.workers: .* of /dev/shm, .*--shm-size"):
        check_memory(config, 2)
    check_memory(tiny_config(folder, tiny.run_content(folder)), 2)  # without workers none of it is used


def test_shipped_counts_follow_the_file_names() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "runs" / "ucit_keeplora.yaml")
    for task in config.benchmark.tasks:
        assert task.records["test"] == 3000
        assert ("4w" in str(task.train)) == (task.records.get("train") == 40_000)


def test_weights_that_are_missing_are_found_before_the_run_begins(folder: Path) -> None:
    config = write_config(folder, tiny.run_content(folder))
    weights = folder / "model" / "model.safetensors"
    weights.rename(folder / "elsewhere")
    result = CliRunner().invoke(app, ["check", str(config)])
    assert isinstance(result.exception, InputError)
    assert str(folder / "model") in str(result.exception)
    with pytest.raises(InputError, match="the weights cannot be read"):
        run_here(load_config(config), folder / "run")
    assert not (folder / "run" / "run.json").exists()


def test_weights_of_another_shape_are_found(folder: Path) -> None:
    config = write_config(folder, tiny.run_content(folder))
    tensors = load_file(folder / "model" / "model.safetensors")
    name = next(name for name in sorted(tensors) if "down_proj" in name)
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model" / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(app, ["check", str(config)])
    assert "mismatched keys" in str(result.exception)
    assert "down_proj" in str(result.exception)


def test_a_run_that_recorded_nothing_may_get_another_model(folder: Path) -> None:
    config = load_config(write_config(folder, tiny.run_content(folder)))
    with pytest.raises(KeyboardInterrupt):
        execute(config, Launch(folder / "run"), Silent(), after_stage=lambda run: None, run_stage=_interrupted)
    assert (folder / "run" / "run.json").is_file()
    tiny.build_model(folder / "model", seed=1)
    execute(
        config, Launch(folder / "run", until=0), Silent(), after_stage=lambda run: None, run_stage=stage_runner(config)
    )


def _interrupted(run: object, stage: int) -> None:
    raise KeyboardInterrupt
