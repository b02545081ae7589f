"""The page that sets several runs side by side, one part for each benchmark among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_cl.errors import InputError
from llava_cl.evaluation.metrics import mean
from llava_cl.report.curves import stage_panels
from llava_cl.report.document import document, section
from llava_cl.report.heatmap import colour_top, heat_cells, heat_row, heat_table
from llava_cl.report.intervals import LEVEL, RESAMPLES, Difference, mean_difference, paired_difference
from llava_cl.report.load import RunRecord, load_run, read_file, verified, warn
from llava_cl.report.schema import StageScores, TaskScore
from llava_cl.report.svg import Point
from llava_cl.report.tables import head_row, plain_table
from llava_cl.report.text import LOWER_IS_BETTER, MISSING, escape, metric, percent, shown, signed
from llava_cl.store import write_text

_REACH = 0.95
"""Of half the width of a cell, what the longest interval takes."""


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
    html += _differences(records)
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
        rows.append(head_row(_run_title(record), f'{cells}<td class="state">{escape(record.state)}</td>'))
    return plain_table(("run", *names, "state"), rows, "sided")


def _last_rows(records: Sequence[RunRecord]) -> str:
    bases = {
        record.run.base.sha256: record.metrics.base_row for record in records if record.metrics.base_row is not None
    }
    named = [(f"base <small>{escape(sha256[:12])}</small>", row) for sha256, row in bases.items()]
    named += [
        (_run_title(record) + _at(record), record.metrics.matrix[-1]) for record in records if record.metrics.matrix
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


def _run_title(record: RunRecord) -> str:
    """What a run is called on a page of several, as HTML."""
    detail = f"{record.run.method}, seed {record.run.seed}, {record.directory.resolve().name}"
    return f"{escape(record.run.name)} <small>{escape(detail)}</small>"


def _differences(records: Sequence[RunRecord]) -> str:
    """The section of a group of runs of the same tasks; empty for one run, or where no stage is done.

    Raises:
        InputError: scores that do not follow their schema.
    """
    stage = min(record.done for record in records)
    if len(records) < 2 or stage == 0:
        return ""
    first, *others = (_scores(record, stage) for record in records)
    tasks = records[0].run.tasks
    found = [_by_task(scores, first, tasks) for scores in others]
    known = [one for row in found for one in row if one is not None]
    reach = max((abs(end) for one in known for end in (one.low, one.high)), default=0.0) or 1.0
    rows = [
        head_row(_run_title(record), "".join(_difference_cell(one, reach) for one in row))
        for record, row in zip(records[1:], found, strict=True)
    ]
    captions = any(score.metrics for score in first.values())
    note = (
        f"Points by which each run is above {records[0].run.name} ({records[0].directory.resolve().name}) after stage "
        f"{stage}, with {100 * LEVEL:.0f} percent confidence intervals: a paired bootstrap over the test questions, "
        f"{RESAMPLES} resamples. In bold where the interval leaves zero out. It does not tell how much another seed "
        "would change." + (" Captions: the mean of the sentences' own scores." if captions else "")
    )
    table = plain_table(("run", *tasks, "mean"), rows, "apart")
    return section(f"{records[0].run.benchmark}: differences", table, note)


def _scores(record: RunRecord, stage: int) -> dict[str, TaskScore]:
    problems: list[str] = []
    content = read_file(StageScores, record.stages[stage].folder / "scores.json", problems)
    if content is None:
        raise InputError(*problems)
    return content.scores


def _by_task(
    ours: Mapping[str, TaskScore], theirs: Mapping[str, TaskScore], tasks: Sequence[str]
) -> list[Difference | None]:
    """Of each task, and of their mean."""
    pairs = {task: (ours[task].credits, theirs[task].credits) for task in tasks if task in ours and task in theirs}
    by_task = [paired_difference(*pairs[task]) if task in pairs else None for task in tasks]
    return [*by_task, mean_difference(pairs)]


def _difference_cell(one: Difference | None, reach: float) -> str:
    if one is None:
        return f'<td title="not the same questions">{MISSING}</td>'
    low, high, middle = (50 + 50 * _REACH * value / reach for value in (one.low, one.high, one.mean))
    style = "up" if one.low > 0 else "down" if one.high < 0 else ""
    value = f"<b>{signed(one.mean)}</b>" if one.clear else signed(one.mean)
    return (
        f'<td class="{style}">{value}<small>{signed(one.low)} to {signed(one.high)}</small>'
        f'<span aria-hidden="true"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<u style="left:{middle:.1f}%"></u></span></td>'
    )
