"""The comparison of several runs."""

import json
import re
from pathlib import Path

import pytest
from report_html import check_page
from report_runs import SUMMARY, metrics, write_json, write_run

from llava_cl.errors import InputError
from llava_cl.report import compare_runs


def cells_of(html: str, run: str) -> list[str]:
    row = re.search(rf'<tr><th scope="row">{run} .*?</tr>', html)
    assert row
    return re.findall(r"<td.*?</td>", row.group())


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cl.report.compare.verified", lambda record: record)  # the metrics are made up
    first = write_run(tmp_path / "a", 6, name="first")
    second = write_run(tmp_path / "b", 6, name="second")
    summary = {**SUMMARY, "MFN": 80.0, "BWT": -3.0, "Forgetting": 0.5, "MAA": None}
    write_json(second / "metrics.json", {**metrics(6), "summary": summary})
    partial = write_run(tmp_path / "c", 2, name="third")
    write_json(partial / "metrics.json", {**metrics(2), "summary": {**SUMMARY, "MFN": 99.0}})
    path = compare_runs([first, second, partial], tmp_path / "new" / "comparison.html")
    assert path == tmp_path / "new" / "comparison.html"
    html = path.read_text(encoding="utf-8")
    page = check_page(html)
    assert "3 runs side by side" in page.text
    mfn, bwt, forgetting, maa = 4, 6, 8, 5
    marked = '<td class="number best">'
    assert cells_of(html, "second")[mfn] == f"{marked}80.00</td>"
    assert cells_of(html, "first")[bwt] == f"{marked}−1.98</td>"
    assert cells_of(html, "second")[forgetting] == f"{marked}0.50</td>"
    assert cells_of(html, "second")[maa] == '<td class="number">–</td>'
    assert cells_of(html, "third")[mfn] == '<td class="number">99.00</td>'
    assert cells_of(html, "third")[bwt] == '<td class="number">−1.98</td>'  # as good as the best, but not at the end
    assert "stage 3 of 6 under way" in page.text
    assert "<span>third</span><b>92.2</b>" in html  # the mean of 90.53 and 93.8, the tasks seen
    assert html.count(">89.1</td>") == 2  # both last rows
    assert "90.5</td>" in html


def test_names_are_no_markup_anywhere(tmp_path: Path) -> None:
    names = {part: f'<i class="{part}">&"{part}' for part in ("name", "benchmark", "method")}
    runs = [write_run(tmp_path / part, 6) for part in ('<i class="folder">', "b")]
    for run in runs:
        content = json.loads((run / "run.json").read_text())
        write_json(run / "run.json", {**content, **names})
    html = compare_runs(runs, tmp_path / "to.html").read_text(encoding="utf-8")
    text = "\n".join(check_page(html).text)
    for part in ("name", "benchmark", "method", "folder"):
        assert f'<i class="{part}"' not in html
        assert f'<i class="{part}"' in text, part
    # Both runs' metrics and rows and curves, the second's differences, and the sentence about them.
    assert text.count(names["name"]) == 8


def test_a_row_of_a_run_under_way_says_its_stage(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 6, name="whole"), write_run(tmp_path / "b", 2, name="part")]
    text = "\n".join(check_page(compare_runs(runs, tmp_path / "to.html").read_text(encoding="utf-8")).text)
    assert text.count("after stage 2 of 6") == 1
    assert "after stage 6 of 6" not in text


def test_other_benchmarks_are_kept_apart(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 6)
    second = write_run(tmp_path / "b", 6)
    run = json.loads((second / "run.json").read_text())
    write_json(second / "run.json", {**run, "benchmark": "DCL <b>"})
    html = compare_runs([first, second], tmp_path / "to.html").read_text(encoding="utf-8")
    page = check_page(html)
    assert "UCIT: metrics" in page.text
    assert "DCL <b>: metrics" in page.text
    assert "number best" not in html


def test_run_with_nothing_yet(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a", 0)
    (root / "metrics.json").unlink()
    check_page(compare_runs([root], tmp_path / "to.html").read_text(encoding="utf-8"))


def test_all_the_problems_of_all_the_runs(tmp_path: Path) -> None:
    good = write_run(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError) as caught:
        compare_runs([tmp_path / "b", good, tmp_path / "c"], tmp_path / "to.html")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "to.html").exists()
    with pytest.raises(InputError, match="no run to compare"):
        compare_runs([], tmp_path / "to.html")
