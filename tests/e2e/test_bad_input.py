"""Wrong input gives exit code 2 and one message that says what and where, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
