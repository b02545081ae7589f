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
    Console(file=stream, width=160).print(table)
    return stream.getvalue()


def test_matrix() -> None:
    lines = printed(console_table(metrics(2))).splitlines()
    rows = {line.split()[1]: [part for part in line.split() if part[0].isdigit()] for line in lines if "│" in line}
    assert rows["base"] == ["16.27", "53.73", "38.39", "19.20", "20.63", "41.88"]
    assert rows["2"][-1] == "92.16"  # mean of 90.53 and 93.80
    assert len(rows) == 3


def test_names_are_not_markup() -> None:
    assert printed(console_table(metrics(1, ["[red]x", *TASKS[1:]]))).count("[red]x") == 2


def test_summary() -> None:
    text = printed(summary_table(metrics(6)))
    assert "6 of 6 stages" in text
    assert "−1.98" in text
    assert printed(summary_table({**metrics(2), "summary": None})).count("–") == 9


def test_wrong_metrics() -> None:
    with pytest.raises(InputError, match="field tasks"):
        console_table({"format": 1})
