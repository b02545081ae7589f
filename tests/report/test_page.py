"""The page of a run, at every moment of the run."""

import json
import time
from pathlib import Path

import pytest
from report_html import check_page, drawings
from report_runs import PROBES, TASKS, metrics, write_json, write_run

from llava_cl.errors import InputError
from llava_cl.report import load_run, write_report
from llava_cl.report.page import render_page

HOSTILE = '<script>alert("1")</script>\' onload="x" & $x^{$'


def test_full_run(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path, 6))
    assert path == tmp_path / "report" / "index.html"
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    html = path.read_text(encoding="utf-8")
    page = check_page(html)
    assert len(html) < 120_000
    for text in ("ucit_keeplora", "keeplora on UCIT", "Complete, 6 stages", "74.16", "−1.98", "61.5 GiB"):
        assert text in page.text
    # one panel a task, a probe, a kind of layer (its rank and its energy) and a stage's loss; two of faint lines
    assert len(drawings(html)) == 6 + len(PROBES) + 2 * 4 + 6 + 2
    assert "prefers-color-scheme: dark" in html
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_partial_run_says_where_it_stands(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    write_json(tmp_path / "metrics.json", {**metrics(2), "summary": None})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = check_page(html)
    assert "Stage 3 of 6 under way" in page.text
    assert "92.16" in page.text  # the mean of 90.53 and 93.8
    assert [value for tag, name, value in page.attributes if (tag, name) == ("li", "class")] == [
        "done",
        "done",
        "underway",
        "ahead",
        "ahead",
        "ahead",
    ]
    assert "3 VizWiz" in page.text  # its training loss
    assert "Metrics" not in page.text


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    (tmp_path / "metrics.json").unlink()
    page = write_report(tmp_path)
    check_page(page.read_text(encoding="utf-8"))
    assert [file.name for file in page.parent.iterdir()] == ["index.html"]


def test_probes_start_after_stage_one_where_the_base_was_not_evaluated(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    content = metrics(2)
    content["base_row"] = None
    content["probes"]["rows"] = content["probes"]["rows"][1:]
    write_json(tmp_path / "metrics.json", content)
    chart = next(
        drawing
        for drawing in drawings(render_page(load_run(tmp_path)))
        if drawing.get("aria-label") == "captions: accuracy by stage"
    )
    labels = {text.text: float(text.get("x", "nan")) for text in chart.iter("text")}
    line = next(path for path in chart.iter("path") if path.get("class") == "line")
    assert line.get("d", "").startswith(f"M{labels['1']:.1f} ")


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    tasks = [HOSTILE, *TASKS[1:]]
    write_run(tmp_path, 2, name=HOSTILE, tasks=tasks)
    content = metrics(2, tasks)
    content["probes"]["names"] = [HOSTILE, *PROBES[1:]]
    content["stages"][0]["seconds"][HOSTILE] = 3.0
    layers = content["stages"][0]["basis"]
    layers[HOSTILE] = layers["model.language_model.layers.0.self_attn.q_proj"]
    write_json(tmp_path / "metrics.json", content)
    run = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "run.json", {**run, "environment": {HOSTILE: [HOSTILE]}, "benchmark": HOSTILE})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = check_page(html)
    assert HOSTILE in page.text  # the title and the headings show it as it is
    assert ("li", "title", HOSTILE) in page.attributes
    assert html.count("<script") == 1  # the page's own, see check_page


def test_settings_are_shown_flat(tmp_path: Path) -> None:
    page = check_page(render_page(load_run(write_run(tmp_path, 0))))
    for key, value in {
        "method.rank": "128",
        "data.root": "https://example.org/<data>",
        "layers": '["q", "v"]',
        "deepspeed": "null",
    }.items():
        assert page.text[page.text.index(key) + 1] == value


def test_code_that_changed_during_the_run_is_shown(tmp_path: Path) -> None:
    run = json.loads((write_run(tmp_path, 0) / "run.json").read_text())
    changes = [{"time": "2026-01-02T03:04:05+00:00", "files": ["data/chat.py", HOSTILE]}]
    write_json(tmp_path / "run.json", {**run, "code_changes": changes})
    page = check_page(render_page(load_run(tmp_path)))
    assert page.text[page.text.index("2026-01-02T03:04:05+00:00") + 1] == f"data/chat.py, {HOSTILE}"


def test_same_run_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    report = tmp_path / "report"
    write_report(tmp_path)
    first = {file.name: file.read_bytes() for file in report.iterdir()}
    write_report(tmp_path)
    assert {file.name: file.read_bytes() for file in report.iterdir()} == first


def test_page_is_cheap(tmp_path: Path) -> None:
    record = write_run(tmp_path, 6)
    begin = time.perf_counter()
    render_page(load_run(record))
    assert time.perf_counter() - begin < 1.0


def test_old_page_stays_where_the_run_cannot_be_read(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, 0))
    before = page.read_bytes()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(tmp_path)
    assert page.read_bytes() == before
