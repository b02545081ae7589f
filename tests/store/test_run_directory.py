"""Manifests: what is recorded as complete is complete, unchanged, and belongs together."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_cl.errors import InputError
from llava_cl.store import RunDirectory, StageDirectory, read_json, write_json, write_text


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run", ["Colour", "Tone"])
    run.record({"identity": {"seed": 1}, "base": {"sha256": "x", "path": "/here"}, "data": {}})
    return run


@pytest.fixture
def stage(run: RunDirectory) -> StageDirectory:
    """Stage 1, after a stage 0 without steps, with one recorded step of two files."""
    run.stage(0).commit()
    return _trained(run.stage(1))


def _trained(stage: StageDirectory) -> StageDirectory:
    write_text(stage.train_log, "log")
    write_text(stage.adapter / "weights", "weights")
    stage.record_step("train", [stage.train_log, stage.adapter / "weights"], seconds={"train": 1.5})
    return stage


def test_layout_is_the_documented_one(run: RunDirectory) -> None:
    assert run.manifest == run.path / "run.json"
    assert run.metrics == run.path / "metrics.json"
    assert run.matrix == run.path / "accuracy_matrix.csv"
    assert run.stage(0).path == run.path / "stages" / "00-base"
    assert [stage.path.name for stage in run.stages()] == ["01-Colour", "02-Tone"]
    stage = run.stage(2)
    assert {
        path.relative_to(stage.path).as_posix()
        for path in (
            stage.adapter,
            stage.subspace,
            stage.predictions,
            stage.scores,
            stage.train_log,
            stage.timings,
            stage.manifest,
        )
    } == {
        "adapter",
        "subspace.safetensors",
        "predictions",
        "scores.json",
        "train_log.jsonl",
        "timings.json",
        "stage.json",
    }


def test_a_step_is_done_once_it_is_recorded(run: RunDirectory, stage: StageDirectory) -> None:
    assert stage.step_done("train")
    assert not stage.step_done("protect")
    assert not run.stage(2).step_done("train")


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_of_a_done_step_is_named(stage: StageDirectory, damage: str) -> None:
    file = stage.adapter / "weights"
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    said = {"flipped": "has changed since it was recorded", "missing": "is missing"}[damage]
    with pytest.raises(InputError) as error:
        stage.step_done("train")
    assert str(error.value).startswith(f"{file}: {said}. Restore it, or redo ")
    assert "--redo 1" in str(error.value)


def test_a_step_whose_file_does_not_exist_cannot_be_recorded(stage: StageDirectory) -> None:
    with pytest.raises(InputError, match=r"scores\.json: cannot be read \(No such file"):
        stage.record_step("score", [stage.scores])
    assert not stage.step_done("score")


def test_facts_of_all_steps_are_kept(stage: StageDirectory) -> None:
    stage.record_step("protect", [], seconds={"protect": 2.0})
    assert {fact["step"]: fact["seconds"] for fact in stage.step_facts()} == {
        "train": {"train": 1.5},
        "protect": {"protect": 2.0},
    }


def test_commit_covers_the_files_of_all_steps(stage: StageDirectory) -> None:
    write_text(stage.scores, "scores")
    stage.record_step("score", [stage.scores])
    assert not stage.committed
    stage.commit()
    assert stage.committed
    files = {"train_log.jsonl", "adapter/weights", "scores.json", "steps/train.json", "steps/score.json"}
    assert read_json(stage.manifest)["files"].keys() == files
    stage.verify()
    write_text(stage.scores, "other")
    with pytest.raises(InputError, match=r"scores\.json: has changed"):
        stage.verify()


def test_a_stage_after_other_stages_is_refused(run: RunDirectory, stage: StageDirectory) -> None:
    stage.commit()
    assert [each.stage for each in run.verified()] == [0, 1]
    run.record({"identity": {"seed": 2}, "base": {"sha256": "x", "path": "/here"}, "data": {}})
    with pytest.raises(InputError, match="in another run"):
        run.stage(0).verify()
    run.stage(0).commit()
    with pytest.raises(InputError, match="after other earlier stages"):
        stage.verify()


@pytest.mark.parametrize("committed", [True, False])
def test_what_does_not_belong_to_the_chain_is_refused(
    run: RunDirectory, stage: StageDirectory, tmp_path: Path, committed: bool
) -> None:
    """A stage of another run, or in another one's place, whether it is committed or under way."""
    stage.commit()
    second = _trained(run.stage(2))
    assert [each.stage for each in run.verified()] == [0, 1, 2]
    assert [each.stage for each in run.verified(1)] == [0, 1]
    other = RunDirectory(tmp_path / "other", ["Colour", "Tone"])
    other.record({"identity": {"seed": 2}, "base": {"sha256": "x", "path": "/here"}, "data": {}})
    other.stage(0).commit()
    foreign = _trained(other.stage(1))
    if committed:
        foreign.commit()
        second.commit()
    places = {"foreign": (foreign.path, stage.path, 1), "swapped": (stage.path, second.path, 2)}
    for source, target, number in places.values():
        aside = tmp_path / "aside"
        target.rename(aside)
        shutil.copytree(source, target)
        with pytest.raises(InputError, match=rf"in another run, than those .* --redo {number}\."):
            run.verified()
        with pytest.raises(InputError, match="in another run"):
            run.stage(number).step_done("train")
        shutil.rmtree(target)
        aside.rename(target)
    assert [each.stage for each in run.verified()] == [0, 1, 2]


def test_the_chain_ends_with_what_is_not_trained(run: RunDirectory, stage: StageDirectory) -> None:
    assert [each.stage for each in run.verified()] == [0, 1]
    stage.commit()
    second = run.stage(2)
    write_text(second.initial_factors, "factors")
    second.record_step("initialise", [second.initial_factors])
    assert [each.stage for each in run.verified()] == [0, 1]
    write_text(second.initial_factors, "other")
    assert [each.stage for each in run.verified(1)] == [0, 1]
    with pytest.raises(InputError, match=r"initial_factors\.safetensors: has changed .* --redo 2"):
        run.verified()


def test_records_of_format_1_need_not_say_what_they_follow(run: RunDirectory, stage: StageDirectory) -> None:
    """Those of format 2 must, also beside them."""
    record = stage.path / "steps" / "train.json"
    content = read_json(record)
    del content["follows"]
    write_json(record, content)
    with pytest.raises(InputError, match="in another run"):
        run.verified()
    run.record({**run.recorded(), "format": 1})
    run.stage(0).commit()
    assert [each.stage for each in run.verified()] == [0, 1]
    write_json(record, {**content, "follows": "something else"})
    with pytest.raises(InputError, match="in another run"):
        run.verified()
    run.record({**run.recorded(), "format": 3})
    with pytest.raises(InputError, match=r"run\.json: is of a newer version"):
        run.verified()


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": [], "follows": ""}', '{"files": {"a": 1}, "follows": ""}'])
@pytest.mark.parametrize("name", ["stage.json", "steps/train.json"])
def test_a_manifest_of_another_kind_is_named(stage: StageDirectory, name: str, content: str) -> None:
    if name == "stage.json":
        stage.commit()
    (stage.path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(str(stage.path / name))):
        stage.verify()


def test_the_place_of_the_base_model_does_not_matter(run: RunDirectory) -> None:
    digests = set()
    for place in ("/here", "/there"):
        run.record({"identity": {}, "base": {"sha256": "x", "path": place}, "data": {}})
        digests.add(run.before(0))
    assert len(digests) == 1


def test_leftovers_of_interrupted_writes_are_removed(stage: StageDirectory) -> None:
    leftover = stage.adapter / ".weights.123.tmp"
    leftover.write_text("half")
    write_text(stage.checkpoints / "checkpoint-3" / "optimizer.pt", "scratch of the training that is recorded")
    stage.clear_leftovers()
    assert not stage.checkpoints.exists()
    assert not leftover.exists()
    assert stage.step_done("train")


def test_stages_to_be_done_again_are_set_aside_and_nothing_is_deleted(run: RunDirectory, stage: StageDirectory) -> None:
    write_text(run.stage(2).train_log, "log")
    assert {path.name for path in run.set_aside(1)} == {"01-Colour", "02-Tone"}
    assert run.stage(0).path.exists()
    assert not stage.path.exists()
    assert not run.begun
    assert (run.path / "discarded/1/01-Colour/train_log.jsonl").read_text() == "log"
    with pytest.raises(InputError, match=r"--redo 2: .* has no stage 2 or later"):
        run.set_aside(2)


def test_stages_are_set_aside_once_until_they_are_done_again(run: RunDirectory, stage: StageDirectory) -> None:
    write_text(run.stage(2).train_log, "log")
    assert len(run.set_aside(1)) == 2
    _trained(stage)
    run.redone()
    assert run.set_aside(1) == []
    assert stage.step_done("train")
    stage.commit()
    _trained(run.stage(2))
    assert run.set_aside(1) == [], "the run was stopped in a later stage"
    assert run.set_aside(2) == [run.path / "discarded/2/02-Tone"], "another stage is another wish"
    run.redone()
    assert run.set_aside(2) == []
    _trained(run.stage(2)).commit()
    run.redone()
    assert run.set_aside(2) == [run.path / "discarded/3/02-Tone"]


class Killed(BaseException):
    """Stands for a kill signal."""


@pytest.mark.parametrize("again", [1, None, 2])
@pytest.mark.parametrize("point", range(19))
def test_setting_aside_goes_on_wherever_it_was_killed(
    run: RunDirectory, stage: StageDirectory, point: int, again: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before or after each change of the file system; what is left is always the beginning of a run."""
    stage.commit()
    _trained(run.stage(2)).commit()
    left = point

    def survive() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def killing(original: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: Any, **options: Any) -> object:
            survive()
            result = original(*arguments, **options)
            survive()
            return result

        return change

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir"):
            patch.setattr(Path, name, killing(getattr(Path, name)))
        with contextlib.suppress(Killed):
            run.set_aside(1)
        finished = left > 0
    there = [each.stage for each in (run.stage(0), *run.stages()) if each.path.exists()]
    assert there == list(range(len(there)))
    written = (run.path / "redo.json").exists()
    with contextlib.suppress(InputError):  # there may be nothing left of stage 2
        run.set_aside(again)
    aside = sorted(path.relative_to(run.path / "discarded").as_posix() for path in run.path.glob("discarded/*/*"))
    if written or again == 1:
        assert aside == ["1/01-Colour", "1/02-Tone"]
        assert not stage.path.exists()
        assert (run.path / "discarded/1/02-Tone/stage.json").is_file()
    else:
        assert not finished
        assert aside == (["1/02-Tone"] if again == 2 else [])


def test_leftovers_beside_the_stages_are_removed_when_the_directory_is_opened(run: RunDirectory) -> None:
    write_text(run.path / ".metrics.json.12.tmp", "half")
    write_text(run.path / "report" / ".index.html.12.tmp", "half")
    with run.locked():
        assert not list(run.path.rglob(".*.tmp"))


_HOLD = """
import sys
from pathlib import Path
from llava_cl.store import RunDirectory
with RunDirectory(Path(sys.argv[1]), []).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(run: RunDirectory) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is working on this directory"), run.locked():
            pytest.fail("the lock was given twice")
    finally:
        holder.kill()  # a lock that outlives its process would block every later run
        holder.communicate()
    with run.locked():
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / "file" / "run", [])
    with pytest.raises(InputError, match="cannot be written"), run.locked():
        pytest.fail("there is no such folder")


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    refused = pytest.raises(InputError, match=r"cannot be locked \(No locks available\); give an --output on")
    with refused, RunDirectory(tmp_path, ()).locked():
        pass
    assert RunDirectory(tmp_path, ()).holder() is None, "nothing is known, so no rank may end for it"


def test_any_byte_of_the_manifest_that_changes_is_noticed(run: RunDirectory) -> None:
    content = {"name": "é", "numbers": [1, 2.5, 1e-05, None, True], "base": {"sha256": "x"}}
    run.record(content)
    assert run.recorded("name", "base") == content
    with pytest.raises(InputError, match=r"run\.json: field 'data' is missing"):
        run.recorded("data")
    intact = run.manifest.read_bytes()
    for place in range(len(intact)):
        for changed in (bytes([intact[place] ^ 1]), b" ", b""):
            if intact[place : place + 1] != changed:
                run.manifest.write_bytes(intact[:place] + changed + intact[place + 1 :])
                with pytest.raises(InputError, match=r"run\.json: "):
                    run.recorded()
    write_json(run.manifest, content)
    with pytest.raises(InputError, match=r"run\.json: has changed since it was recorded, or is of another version"):
        run.recorded()
