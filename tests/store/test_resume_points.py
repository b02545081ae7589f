"""Resume points that are damaged, strange or half there are passed over, each with a word."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_cl.store import resume_points

FACTS = {"ranks": 1, "zero": 0}


def _point(folder: Path, step: int) -> Path:
    point = folder / f"checkpoint-{step}"
    point.mkdir(parents=True)
    (point / "optimizer.pt").write_text(f"state {step}")
    resume_points.record(point, FACTS)
    return point


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda point: (point / name).write_text(text) and None


def _file(point: Path) -> None:
    shutil.rmtree(point)
    point.write_text("a file")


def _link(point: Path) -> None:
    point.rename(point.parent / "elsewhere")
    point.symlink_to(point.parent / "elsewhere")


def _dangling(point: Path) -> None:
    shutil.rmtree(point)
    point.symlink_to(point.parent / "gone")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no record": lambda point: (point / "complete.json").unlink(),
    "half a record": _text("complete.json", '{"facts": {'),
    "a list": _text("complete.json", "[]"),
    "no files": _text("complete.json", '{"facts": {"ranks": 1, "zero": 0}}'),
    "no facts": _text("complete.json", '{"files": {}}'),
    "files as a list": _text("complete.json", '{"facts": {}, "files": ["optimizer.pt"]}'),
    "hashes as numbers": _text("complete.json", '{"facts": {}, "files": {"optimizer.pt": 1}}'),
    "another file": _text("optimizer.pt", "other"),
    "no file": lambda point: (point / "optimizer.pt").unlink(),
    "a file": _file,
    "a link": _link,
    "a dangling link": _dangling,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_point_is_not_used_and_the_one_before_is(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    older, damaged = _point(folder, 9), _point(folder, 10)
    assert resume_points.resume_steps(folder) == [9, 10]
    assert resume_points.newest(folder, FACTS) == damaged
    DAMAGES[kind](damaged)
    with caplog.at_level(logging.WARNING):
        assert resume_points.newest(folder, FACTS) == older
    assert [record.message for record in caplog.records if str(damaged) in record.message]
    assert caplog.records[0].message.endswith("; this resume point is not used")
    assert not damaged.is_symlink()
    assert not damaged.exists()
    assert resume_points.resume_steps(folder) == [9]


@pytest.mark.parametrize("name", ["checkpoint-1.bak", "checkpoint-foo", "checkpoint-", "checkpoint--3", "checkpoint-²"])
def test_what_is_called_otherwise_is_no_point(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    point = _point(tmp_path, 9)
    shutil.copytree(point, tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert resume_points.newest(tmp_path, FACTS) == point
    assert [record.message for record in caplog.records] == [f"{tmp_path / name}: is no resume point and not used"]
    assert resume_points.resume_steps(tmp_path) == [9]
    assert (tmp_path / name / "optimizer.pt").is_file()


def test_points_are_newest_by_their_number_and_hold_for_their_facts(tmp_path: Path) -> None:
    assert resume_points.newest(tmp_path / "none", FACTS) is None
    _point(tmp_path, 9)
    ten = _point(tmp_path, 10)
    assert resume_points.newest(tmp_path, FACTS) == ten
    assert resume_points.newest(tmp_path, {**FACTS, "ranks": 2}) is None


@pytest.mark.parametrize("place", ["folder", "file", "link", "dangling", "nothing"])
def test_whatever_is_in_the_place_of_resume_points_is_discarded(tmp_path: Path, place: str) -> None:
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "checkpoints"
    elsewhere.mkdir()
    {
        "folder": lambda: _point(path, 3),
        "file": lambda: path.write_text("a file"),
        "link": lambda: path.symlink_to(elsewhere),
        "dangling": lambda: path.symlink_to(tmp_path / "gone"),
        "nothing": lambda: None,
    }[place]()
    resume_points.newest(path, FACTS)
    resume_points.discard(path)
    assert sorted(tmp_path.iterdir()) == [elsewhere]
