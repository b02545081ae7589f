"""What was changed since it was recorded, or is of another run, is told on the page and is not exported as a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from report_html import check_page
from report_runs import MATRIX, metrics, write_json, write_run
from test_tracking import config, scalars
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.errors import InputError
from llava_cl.pipeline.progress import Event
from llava_cl.pipeline.results import collect_results, matrix_csv
from llava_cl.report import compare_runs, export_run, live_page, load_run, write_report
from llava_cl.report.live_page import LivePage
from llava_cl.report.load import verified
from llava_cl.report.tracking import Tracking
from llava_cl.store import RunDirectory

FIRST, SECOND = "stages/01-ImageNet-R", "stages/02-ArxivQA"


def _edit(name: str, old: str, new: str) -> Callable[[Path], str]:
    def damage(run: Path) -> str:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
        return name

    return damage


def _foreign(run: Path) -> str:
    other = write_run(run.parent / "other", 2, name="another")
    manifest = RunDirectory(other, ()).recorded()
    tasks = manifest["tasks"]
    RunDirectory(other, tasks).record({**manifest, "identity": {"seed": 9}})
    for number in (0, 1):
        RunDirectory(other, tasks).stage(number).commit()
    shutil.rmtree(run / FIRST)
    shutil.copytree(other / FIRST, run / FIRST)
    return f"{FIRST}: was computed after other earlier stages, or in another run"


def _swapped(run: Path) -> str:
    (run / FIRST).rename(run / "aside")
    (run / SECOND).rename(run / FIRST)
    (run / "aside").rename(run / SECOND)
    return f"{FIRST}: was computed after other"


def _summary(run: Path) -> str:
    content = metrics(2)
    write_json(run / "metrics.json", {**content, "summary": {**content["summary"], "MFN": 99.0}})
    return "metrics.json: is not what the stages say"


def _fewer(run: Path) -> str:
    write_json(run / "metrics.json", metrics(0))
    return "metrics.json: is not what the stages say"


def _gone(run: Path) -> str:
    (run / "metrics.json").unlink()
    return "metrics.json: is not what the stages say"


def _csv(run: Path) -> str:
    (run / "accuracy_matrix.csv").write_text("after stage,ImageNet-R\nImageNet-R,99.99\n")
    return "accuracy_matrix.csv: is not what the stages say"


DAMAGES: dict[str, Callable[[Path], str]] = {
    "metrics": _edit("metrics.json", "93.8", "99.8"),
    "base": _edit("metrics.json", "53.73", "3.73"),
    "probes": _edit("metrics.json", "48.5", "78.5"),
    "summary": _summary,
    "fewer": _fewer,
    "gone": _gone,
    "csv": _csv,
    "scores": _edit(f"{SECOND}/scores.json", "93.8", "99.8"),
    "record": _edit(f"{SECOND}/steps/score.json", "93.8", "99.8"),
    "loss": _edit(f"{FIRST}/train_log.jsonl", '"loss": 1', '"loss": 0'),
    "manifest": _edit("run.json", '"seed": 42', '"seed": 43'),
    "not JSON": _edit(f"{FIRST}/stage.json", "{", ""),
    "foreign": _foreign,
    "swapped": _swapped,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_told_and_not_exported(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", 2)
    stages = [RunDirectory(run, json.loads((run / "run.json").read_text())["tasks"]).stage(number) for number in (1, 2)]
    table = matrix_csv(collect_results(stages, metrics(2)["tasks"], [], seen=False))
    (run / "accuracy_matrix.csv").write_text(table)
    assert verified(load_run(run)).problems == ()
    assert "Damaged" not in write_report(run).read_text()
    said = DAMAGES[kind](run)
    before = {file.name for file in (run / "report").iterdir()}
    result = CliRunner().invoke(app, ["report", str(run), "--export"])
    page = check_page((run / "report" / "index.html").read_text(encoding="utf-8"))
    assert "Damaged" in page.text
    assert any(said in text for text in page.text)
    assert said in result.stderr
    assert any("damaged" in text for text in page.text[:12])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
    assert {file.name for file in (run / "report").iterdir()} == before
    with pytest.raises(InputError, match=r".*"):
        export_run(run)
    whole = write_run(tmp_path / "whole", 2)
    compared = check_page(compare_runs([run, whole], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert [text for text in compared.text if text.startswith("stage ")] == [
        "stage 3 of 6 under way, damaged",
        "stage 3 of 6 under way",
    ]


def test_a_run_under_way_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """Between the commit of a stage and its results."""
    run = write_run(tmp_path, 2)
    write_json(run / "metrics.json", metrics(1))
    assert verified(load_run(run)).problems == ()


def _everything(run: Path) -> list[Callable[[], object]]:
    """What can befall files that only show, one after the other."""
    return [
        lambda: (run / "stages" / "01-backup").mkdir(),
        lambda: (run / "logs").mkdir(exist_ok=True),
        lambda: (run / "logs" / "tracked.json").write_text("{"),
        lambda: (run / "logs" / "tracked.json").write_text('{"tensorboard": "x"}'),
        lambda: (run / "metrics.json").write_text("{"),
        lambda: (run / FIRST / "train_log.jsonl").write_bytes(b"\xff\n"),
        lambda: (run / SECOND / "scores.json").write_text("[]"),
        lambda: (run / SECOND / "stage.json").write_text("[]"),
        lambda: (shutil.rmtree(run / "report"), (run / "report").write_text("a file where the folder was")),
        lambda: (run / "run.json").write_text("{"),
    ]


def test_what_only_shows_never_ends_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, 2)
    notes: list[str] = []
    with LivePage(run, 0, notes.append) as page, Tracking(config(["tensorboard"]), run, notes.append) as tracking:
        for befall in _everything(run):
            befall()
            page.event(Event(3, "train", 1, 2))
            page.committed()
            tracking.update()
    assert len(set(notes)) == len(notes), "each thing once"
    for named in ("tracked.json: cannot be read", "metrics.json: ", "train_log.jsonl", "scores.json", "run.json: "):
        assert [note for note in notes if named in note], named
    assert not [note for note in notes if "backup" in note]
    assert scalars(run)["accuracy/ArxivQA"][:2] == [(0, pytest.approx(53.73)), (1, pytest.approx(MATRIX[0][1]))]


def test_a_full_disk_keeps_the_page_alone_from_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes = write_run(tmp_path, 2), []
    page = LivePage(run, 0, notes.append)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live_page, "write_text", full)
    for _ in range(3):
        page.committed()
    assert notes == ["the report is not up to date: [Errno 28] No space left on device"]
