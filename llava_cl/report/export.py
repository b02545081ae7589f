"""The accuracy matrix, the curves and the metrics as files for papers: PNG, PDF, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from llava_cl.errors import InputError
from llava_cl.evaluation.metrics import mean
from llava_cl.report.figures import labelled_rows, write_figures
from llava_cl.report.load import load_run, verified
from llava_cl.report.schema import Metrics, first_probed
from llava_cl.report.text import shown
from llava_cl.store import write_text
from llava_cl.terminal import printable

Value = float | None

_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: rf"\text{name}{{}}" for character, name in _NAMED.items()}
)


def export_run(run_dir: Path) -> list[Path]:
    """Write what a paper needs into `run_dir/report`, once a stage is done; the files that were written.

    `accuracy_matrix.{png,pdf,tex}`, `accuracy_table.csv`, `curves.{png,pdf,csv}` (with the base's own questions) and
    `metrics.{csv,tex}`. The LaTeX tables need the package booktabs.

    Raises:
        InputError: a file of the run is missing, does not follow its schema, or was changed since it was recorded.
    """
    record = verified(load_run(Path(run_dir)))
    if record.problems:
        raise InputError(*record.problems)
    folder, metrics = record.directory / "report", record.metrics
    labels, rows = labelled_rows(metrics)
    if not rows:
        return []
    first = metrics.first_stage
    seen = [mean(row[:stage]) if stage else None for stage, row in enumerate(rows, start=first)]
    table = [[label, *row, average] for label, row, average in zip(labels, rows, seen, strict=True)]
    summary = metrics.summary or {}
    names = [name for name in shown([summary]) if summary.get(name) is not None]
    content = {
        "accuracy_table.csv": _csv(["after", *metrics.tasks, "seen so far"], table),
        "accuracy_matrix.tex": _latex(
            "l" + "r" * (len(metrics.tasks) + 1),
            ["after", *metrics.tasks, "seen so far"],
            [_latex_row(row, stage or None) for stage, row in enumerate(table, start=first)],
        ),
        "curves.csv": _csv(["stage", "kind", "name", "accuracy"], _points(metrics)),
        "metrics.csv": _csv(["metric", "value"], [[name, summary[name]] for name in names]),
        "metrics.tex": _latex("r" * len(names), names, [_latex_row([summary[name] for name in names], None)]),
    }
    for name, text in content.items():
        write_text(folder / name, text)
    return [*write_figures(metrics, folder), *(folder / name for name in content)]


def _points(metrics: Metrics) -> list[list[str | Value]]:
    """Every accuracy as a row of its own: stage, task or probe, name, percent."""
    probes = metrics.probes
    of_tasks = "task", metrics.tasks, metrics.rows, metrics.first_stage
    return [
        [str(stage), kind, name, value]
        for kind, names, rows, first in (of_tasks, ("probe", probes.names, probes.rows, first_probed(metrics)))
        for stage, row in enumerate(rows, start=first)
        for name, value in zip(names, row, strict=True)
    ]


def _csv(header: Sequence[str], rows: Sequence[Sequence[str | Value]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(_cell, row) for row in rows)
    return stream.getvalue()


def _latex(columns: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs table of texts that are LaTeX already, below a header that is escaped here."""
    lines = [[_escape(name) for name in header], *rows]
    head, *body = (" & ".join(line) + r" \\" for line in lines)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end, ""])


def _latex_row(row: Sequence[str | Value], bold: int | None) -> list[str]:
    cells = [_escape(cell) if isinstance(cell, str) else _cell(cell).replace("-", "$-$") or "--" for cell in row]
    return [rf"\textbf{{{cell}}}" if number == bold else cell for number, cell in enumerate(cells)]


def _cell(value: str | Value) -> str:
    return printable(value) if isinstance(value, str) else "" if value is None else f"{value:.2f}"


def _escape(text: str) -> str:
    return printable(text).translate(_ESCAPES)
