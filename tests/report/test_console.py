"""The tables for a terminal."""

import io

import pytest
from report_runs import TASKS, metrics
from rich.console import Console
from rich.table import Table

from llava_cl.errors import InputError
from llava_cl.report import console_table, summary_table


def printed(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    return stream.getvalue()


def test_matrix() -> None:
    lines = printed(console_table(metrics(2))).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip() and line.split()[0].isdigit()}
    assert rows["0"] == ["base", "16.27", "53.73", "38.39", "19.20", "20.63", "41.88"]
    assert rows["2"][-1] == "92.16"  # mean of 90.53 and 93.80
    assert rows["3"] == [TASKS[2], *("–" for _ in TASKS), "–"]
    assert len(rows) == 7
    assert max(map(len, lines)) <= 80


def test_names_are_not_markup() -> None:
    assert printed(console_table(metrics(1, ["[red]x", *TASKS[1:]]))).count("[red]x") == 1


def test_summary() -> None:
    text = printed(summary_table(metrics(6)))
    assert "6 of 6 stages" in text
    assert "−1.98" in text
    assert printed(summary_table({**metrics(2), "summary": None})).count("–") == 9


def test_wrong_metrics() -> None:
    with pytest.raises(InputError, match="field tasks"):
        console_table({"format": 1})
