"""The page that sets several runs side by side, one part for each benchmark among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_cl.errors import InputError
from llava_cl.evaluation.metrics import mean
from llava_cl.report.curves import stage_panels
from llava_cl.report.differences import difference_section, run_title
from llava_cl.report.document import document, section
from llava_cl.report.heatmap import colour_top, heat_cells, heat_row, heat_table
from llava_cl.report.load import RunRecord, load_run, verified, warn
from llava_cl.report.svg import Point
from llava_cl.report.tables import head_row, plain_table
from llava_cl.report.text import LOWER_IS_BETTER, escape, metric, percent, shown
from llava_cl.store import write_text


def compare_runs(run_dirs: list[Path], to: Path) -> Path:
    """Write one HTML file, `to`, with the metrics of the runs side by side and their last rows by task.

    Runs are compared only with runs of the same benchmark and the same tasks in the same order.

    Raises:
        InputError: no run is given, or a file of a run is missing or does not follow its schema.
    """
    if not run_dirs:
        raise InputError("no run to compare: give at least one run directory")
    records = []
    problems: list[str] = []
    for directory in run_dirs:
        try:
            records.append(verified(load_run(Path(directory))))
            warn(records[-1])
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    groups: dict[tuple[str, tuple[str, ...]], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.run.benchmark, tuple(record.run.tasks)), []).append(record)
    names = ", ".join(dict.fromkeys(benchmark for benchmark, _ in groups))
    title = "One run" if len(records) == 1 else f"{len(records)} runs side by side"
    header = f'<header><p class="over">{escape(names)}</p><h1>{title}</h1></header>\n'
    parts = [_group(group, f"runs{number}") for number, group in enumerate(groups.values())]
    write_text(Path(to), document(f"{title}: {names}", header + "".join(parts)))
    return Path(to)


def _group(records: Sequence[RunRecord], identifier: str) -> str:
    benchmark, tasks = records[0].run.benchmark, records[0].run.tasks
    note = "The best value of every column, among the runs that are complete, is marked."
    html = section(f"{benchmark}: metrics", _summary_table(records), note)
    note = "Accuracy in percent after the latest stage of every run."
    html += section(f"{benchmark}: by task", _last_rows(records), note)
    html += difference_section(records)
    lines: list[list[Point]] = [
        [(stage, mean(row[:stage])) for stage, row in enumerate(record.metrics.matrix, start=1)] for record in records
    ]
    if not any(lines):
        return html
    drawn = stage_panels([record.run.name for record in records], lines, (1, len(tasks)), identifier)
    note = "Mean accuracy over the tasks seen so far; the other runs are faint."
    return html + section(f"{benchmark}: through the stages", drawn, note)


def _summary_table(records: Sequence[RunRecord]) -> str:
    names = list(shown(record.metrics.summary or {} for record in records))
    best = {name: _best(name, records) for name in names}
    rows = []
    for record in records:
        cells = ""
        for name in names:
            value = (record.metrics.summary or {}).get(name)
            marked = record.complete and value is not None and value == best[name]
            cells += f'<td class="number{" best" if marked else ""}">{metric(name, value)}</td>'
        rows.append(head_row(run_title(record), f'{cells}<td class="state">{escape(record.state)}</td>'))
    return plain_table(("run", *names, "state"), rows, "sided")


def _last_rows(records: Sequence[RunRecord]) -> str:
    bases = {
        record.run.base.sha256: record.metrics.base_row for record in records if record.metrics.base_row is not None
    }
    named = [(f"base <small>{escape(sha256[:12])}</small>", row) for sha256, row in bases.items()]
    named += [
        (run_title(record) + _at(record), record.metrics.matrix[-1]) for record in records if record.metrics.matrix
    ]
    top = colour_top([row for _, row in named])
    rows = [heat_row(title, heat_cells(row, top), percent(mean(row))) for title, row in named]
    return heat_table("run", records[0].run.tasks, "mean", rows, style="runs")


def _at(record: RunRecord) -> str:
    """After which stage a run is that goes on."""
    stages, total = len(record.metrics.matrix), len(record.run.tasks)
    return "" if stages == total else f" <small>after stage {stages} of {total}</small>"


def _best(name: str, records: Sequence[RunRecord]) -> float | None:
    """The best value of a metric among the complete runs; None where there is nothing to choose from."""
    values = [(record.metrics.summary or {}).get(name) for record in records if record.complete]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    return min(known) if name in LOWER_IS_BETTER else max(known)
