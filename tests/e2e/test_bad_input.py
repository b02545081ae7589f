"""Wrong input gives exit code 2 and one message that says what and where, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
from llava_cl import cli
from runs import write_config


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    tiny.run_content(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command line."""
    monkeypatch.setattr("sys.argv", ["llava-cl", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0), capsys.readouterr().err


def _edit_records(file: Path, change: Callable[[list[Any]], None]) -> None:
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))


def _remove_image(folder: Path) -> None:
    (folder / "data/images/Tone/5.png").unlink()


def _truncate_image(folder: Path) -> None:
    file = folder / "data/images/Tone/6.png"
    file.write_bytes(file.read_bytes()[:-30])


def _break_json(folder: Path) -> None:
    file = folder / "data/Colour/train.json"
    file.write_text(file.read_text()[:-20])


def _empty_task(folder: Path) -> None:
    (folder / "data/Tone/train.json").write_text("[]")


def _no_human_turn(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        records[3]["conversations"] = [{"from": "gpt", "value": "red"}]

    _edit_records(folder / "data/Colour/train.json", change)


def _answer_without_mask(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        records[4]["conversations"][1]["value"] = "red ASSISTANT: blue"

    _edit_records(folder / "data/Colour/train.json", change)


def _doubled_question(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        records[1]["question_id"] = records[0]["question_id"]

    _edit_records(folder / "data/Tone/test.json", change)


def _escaping_image(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        records[2]["image"] = "../../run.yaml"

    _edit_records(folder / "data/Tone/train.json", change)


def _image_of_another_name(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        for record in records:
            record["images"] = record.pop("image")

    _edit_records(folder / "data/Tone/test.json", change)


def _references_that_nothing_earns(folder: Path) -> None:
    def change(records: list[Any]) -> None:
        for record in records[2:4]:
            record["answer"] += "\n"

    _edit_records(folder / "data/Tone/test.json", change)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_image_of_another_name, ["Tone/test.json", "'images'", "'image' is missing", "and 8 more like it"]),
        (_references_that_nothing_earns, ["Tone/test.json", "2 of 9 questions' own reference", "'exact'"]),
        (_remove_image, ["Tone-5", "image", "Tone/5.png"]),
        (_truncate_image, ["Tone-6", "image", "Tone/6.png", "cannot be decoded"]),
        (_break_json, ["Colour/train.json", "line"]),
        (_empty_task, ["Tone/train.json", "holds no records"]),
        (_no_human_turn, ["Colour/train.json", "3", "conversations"]),
        (_answer_without_mask, ["Colour/train.json", "Colour-4", "unmatched_limit"]),
        (_doubled_question, ["Tone/test.json", "1", "question_id"]),
        (_escaping_image, ["Tone-2", "../../run.yaml"]),
    ],
)
def test_wrong_data(
    damage: Callable[[Path], None],
    said: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(folder)
    config = write_config(folder, tiny.run_content(folder))
    code, message = run(capsys, monkeypatch, "run", str(config), "--output", str(folder / "out"))
    assert code == 2, message
    assert all(part in message for part in said), message
    assert "Traceback" not in message
    assert not (folder / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rat=1", ["training.learning_rat", "unknown key"]),
        ("data_root=/does/not/exist", ["/does/not/exist", "missing"]),
        ("model.path=/does/not/exist", ["/does/not/exist", "config.json"]),
        ("method.name=keplora", ["keplora", "keeplora"]),
        ("method.options.energi=1", ["energi"]),
        ("training.micro_batch=0", ["micro_batch"]),
        ("name=[", ["--set name=["]),
        ("distributed.ranks=3", ["3 ranks"]),
        ("training", ["--set training"]),
    ],
)
def test_wrong_configuration(
    override: str, said: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(folder, tiny.run_content(folder))
    arguments = ("run", str(config), "--output", str(folder / "out"), "--set", override)
    code, message = run(capsys, monkeypatch, *arguments)
    assert code == 2, message
    assert all(part in message for part in said), message
    assert not (folder / "out" / "run.json").exists()


def test_all_that_is_wrong_is_said_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _remove_image(folder)
    _no_human_turn(folder)
    code, message = run(capsys, monkeypatch, "check", str(write_config(folder, tiny.run_content(folder))))
    assert code == 2
    assert "Tone/5.png" in message
    assert "Colour/train.json" in message


def test_too_little_disk(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    config = write_config(folder, tiny.run_content(folder))
    code, message = run(capsys, monkeypatch, "run", str(config), "--output", str(folder / "out"))
    assert code == 2
    assert "GB are free" in message
    assert not (folder / "out" / "run.json").exists()


def test_missing_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = run(capsys, monkeypatch, "run", str(tmp_path / "none.yaml"))
    assert code == 2
    assert "none.yaml" in message


Damage = Callable[[Path, pytest.MonkeyPatch], list[str]]
"""Spoils something below a folder; returns further arguments of the command line."""


def _no_model(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "model" / "config.json").unlink()
    return []


def _no_questions(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "data/Tone/test.json").unlink()
    return []


def _locked_questions(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    access = os.access
    patch.setattr(os, "access", lambda path, mode: Path(path).name != "test.json" and access(path, mode))
    return []


def _locked_images(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    access = os.access
    patch.setattr(os, "access", lambda path, mode: Path(path).name != "images" and access(path, mode))
    return []


def _locked_output(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    access = os.access
    patch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    return ["--output", str(folder / "new/run")]


def _output_in_a_file(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["--output", str(folder / "run.yaml" / "run")]


def _output_is_a_loop(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "loop").symlink_to("loop")
    return ["--output", str(folder / "loop")]


def _output_too_long(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["--output", str(folder / ("x" * 300))]


def _no_hosts(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "hosts").write_text("# none\n")
    return ["--hostfile", str(folder / "hosts")]


def _few_slots(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "hosts").write_text("one slots=1\n")
    return ["--hostfile", str(folder / "hosts"), "--nproc", "2"]


def _little_memory(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    memory = psutil.virtual_memory()
    patch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=1000))
    return []


def _little_disk(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    usage = shutil.disk_usage(folder)
    patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    return []


def _no_deepspeed_file(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["--set", f"distributed.deepspeed={folder / 'nowhere.json'}"]


def _deepspeed_optimizer(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "deepspeed.json").write_text('{"optimizer": {"type": "AdamW"}}')
    return ["--set", f"distributed.deepspeed={folder / 'deepspeed.json'}"]


def _unusable_gpu(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "nvidia0").touch()
    patch.setattr("llava_cl.pipeline.doctor._DEVICES", (str(folder / "nvidia[0-9]*").lstrip("/"),))
    patch.delenv("CUDA_VISIBLE_DEVICES")
    return []


def _asked_gpu(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_model, "model holds no config.json"),
        (_no_questions, "Tone/test.json: is missing."),
        (_locked_questions, "Tone/test.json: cannot be read (Permission denied)."),
        (_locked_images, "data/images: cannot be read (Permission denied)."),
        (_locked_output, "cannot be written (Permission denied); give another --output."),
        (_output_in_a_file, "run.yaml: is no folder; give another --output."),
        (_output_is_a_loop, "loop: is no folder; give another --output."),
        (_output_too_long, "is no place for a run (File name too long); give another --output."),
        (_no_hosts, "hosts: names no node"),
        (_few_slots, "one has 1 slots, 2 ranks are asked of each node"),
        (_little_memory, "of memory, each of 1 ranks on this machine has"),
        (_little_disk, "GB are free; free some space or give another --output."),
        (_no_deepspeed_file, "nowhere.json: cannot be read (No such file or directory)"),
        (_deepspeed_optimizer, "deepspeed.json: optimizer: take this section out"),
        (_unusable_gpu, "nvidia0: there is a GPU that torch"),
        (_asked_gpu, "CUDA_VISIBLE_DEVICES=0,1: there is a GPU that torch"),
    ],
)
def test_check_run_and_dry_run_find_the_same(
    damage: Damage, said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = write_config(folder, tiny.run_content(folder))
    options = damage(folder, monkeypatch)
    for command in (["check"], ["run"], ["run", "--dry-run"]):
        monkeypatch.setattr("sys.argv", ["llava-cl", *command, str(config), *options])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        assert exit_.value.code == 2, (command, out, err)
        assert said in (" ".join(json.loads(out)["missing"]) if "--dry-run" in command else err), command
        assert "Traceback" not in err
    assert not list(folder.glob("**/run.json"))


def test_a_dry_run_of_what_is_all_there_ends_well_and_needs_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["llava-cl", "run", str(write_config(folder, tiny.run_content(folder))), "--dry-run"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "method.name=kepplora"], "Did you mean 'keeplora'?"),
        (["--set", "model.family=lava"], "Did you mean 'llava'?"),
        (["--set", "lora.targets=[q_prj]"], "Did you mean 'q_proj'?"),
        (["--set", "method.options.enrgy=0.5"], "Did you mean 'energy'?"),
        (["--set", "benchmark.evaluate=al"], "Did you mean 'all'?"),
    ],
)
def test_near_misses_are_named(
    arguments: list[str],
    said: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, message = run(capsys, monkeypatch, "check", str(write_config(folder, tiny.run_content(folder))), *arguments)
    assert code == 2
    assert said in message


def test_near_misses_of_a_benchmark_task_and_scorer_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny.run_content(folder)
    content["benchmark"]["tasks"][0]["scorer"] = "exakt"
    code, message = run(capsys, monkeypatch, "check", str(write_config(folder, content)))
    assert (code, "Did you mean 'exact'?" in message) == (2, True)
    files = ["--questions", "q.json", "--answers", "a.jsonl"]
    for options, said in (
        (["--benchmark", "uict", "--task", "VizWiz"], "Did you mean 'ucit'?"),
        (["--benchmark", "ucit", "--task", "VisWiz"], "Did you mean 'VizWiz'?"),
    ):
        code, message = run(capsys, monkeypatch, "score", *options, *files)
        assert (code, said in message) == (2, True), message
    content = tiny.run_content(folder)
    arguments = ["eval", str(write_config(folder, content)), "--task", "Tome", "--output", str(folder / "run")]
    code, message = run(capsys, monkeypatch, *arguments)
    assert (code, "Did you mean 'Tone'?" in message) == (2, True)
