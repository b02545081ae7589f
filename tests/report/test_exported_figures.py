"""Files for papers: the numbers are those of metrics.json, and names cannot break a table."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from pathlib import Path

import pytest
from report_runs import BASE, MATRIX, SUMMARY, TASKS, metrics, write_json, write_run
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.errors import RunError
from llava_cl.report import export_run, write_report


def rows_of(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_command_writes_everything(tmp_path: Path) -> None:
    run = write_run(tmp_path, 6)
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert [file.name for file in (run / "report").iterdir()] == ["index.html"]
    done = CliRunner().invoke(app, ["report", str(run), "--export"])
    assert done.exit_code == 0
    names = sorted(file.name for file in (run / "report").iterdir())
    assert names == [
        *(f"accuracy_matrix.{kind}" for kind in ("pdf", "png", "tex")),
        "accuracy_table.csv",
        *(f"curves.{kind}" for kind in ("csv", "pdf", "png")),
        "index.html",
        "metrics.csv",
        "metrics.tex",
    ]
    assert all(name in done.stdout.replace("\n", "") for name in names)


def test_csv_holds_the_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path, 6)
    export_run(run)
    header, base, *rows = rows_of(run / "report" / "accuracy_table.csv")
    assert header == ["after", *TASKS, "seen so far"]
    assert base == ["base", *(f"{value:.2f}" for value in BASE), ""]
    assert [[float(value) for value in row[1:-1]] for row in rows] == MATRIX
    assert rows[1][-1] in ("92.16", "92.17")  # the mean of 90.53 and 93.8
    assert {name: float(value) for name, value in rows_of(run / "report" / "metrics.csv")[1:]} == SUMMARY
    points = {tuple(row[:3]): float(row[3]) for row in rows_of(run / "report" / "curves.csv")[1:]}
    assert points["0", "task", "ArxivQA"] == BASE[1]
    assert points["4", "task", "VizWiz"] == MATRIX[3][2]
    assert points["0", "probe", "captions"] == 71
    assert len(points) == 7 * (6 + 4)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics need not follow from the stages."""
    monkeypatch.setattr("llava_cl.report.export.verified", lambda record: record)


def test_latex_is_balanced_and_escaped(tmp_path: Path, made_up: None) -> None:
    tasks = ["50%_a&b#1 {x}", r"\input{y}", *TASKS[2:]]
    run = write_run(tmp_path, 2, tasks=[task.replace("/", "_") for task in tasks])
    content = metrics(2, tasks)
    content["matrix"][1][0] = None
    write_json(run / "metrics.json", content)
    export_run(run)
    text = (run / "report" / "accuracy_matrix.tex").read_text()
    assert r"50\%\_a\&b\#1 \{x\}" in text
    assert r"\textbackslash{}input\{y\}" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [7, 7, 7]
    assert re.findall(r"\\textbf\{(.*?)\}", text) == ["91.07", "93.80"]
    assert body[2].split(" & ")[1] == "--"
    assert r"$-$0.54" in (run / "report" / "metrics.tex").read_text()


def test_nothing_is_written_before_the_first_stage(tmp_path: Path, made_up: None) -> None:
    run = write_run(tmp_path, 0)
    (run / "metrics.json").write_text(json.dumps({"format": 1, "tasks": TASKS}))
    assert export_run(run) == []
    assert not (run / "report").exists()


def test_figures_that_a_full_disk_cannot_hold_are_one_message(small_file_system: Path) -> None:
    run = write_run(small_file_system / "run", 6)
    write_report(run)
    filler = small_file_system / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 40_960)
    with pytest.raises(RunError, match=r"report/\S+: cannot be written \(No space left on device\)"):
        export_run(run)
    with pytest.raises(RunError, match=r"report/index\.html: cannot be written \(No space left on device\)"):
        write_report(run)
    assert not list(run.rglob(".*.tmp"))
