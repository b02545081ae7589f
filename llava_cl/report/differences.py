"""The differences of runs from the first one, task by task, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_cl.errors import InputError
from llava_cl.report.document import section
from llava_cl.report.intervals import LEVEL, RESAMPLES, Difference, mean_difference, paired_difference
from llava_cl.report.load import RunRecord, read_file
from llava_cl.report.schema import StageScores, TaskScore
from llava_cl.report.tables import head_row, plain_table
from llava_cl.report.text import MISSING, escape, signed

_REACH = 0.95
"""Of half the width of a cell, what the longest interval takes."""


def run_title(record: RunRecord) -> str:
    """What a run is called on a page of several, as HTML."""
    detail = f"{record.run.method}, seed {record.run.seed}, {record.directory.resolve().name}"
    return f"{escape(record.run.name)} <small>{escape(detail)}</small>"


def difference_section(records: Sequence[RunRecord]) -> str:
    """The section of a group of runs of the same tasks; empty for one run, or where no stage is done.

    Raises:
        InputError: scores that do not follow their schema.
    """
    stage = min(record.done for record in records)
    if len(records) < 2 or stage == 0:
        return ""
    first, *others = (_scores(record, stage) for record in records)
    tasks = records[0].run.tasks
    found = [_differences(scores, first, tasks) for scores in others]
    known = [one for row in found for one in row if one is not None]
    reach = max((abs(end) for one in known for end in (one.low, one.high)), default=0.0) or 1.0
    rows = [
        head_row(run_title(record), "".join(_cell(one, reach) for one in row))
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


def _differences(
    ours: Mapping[str, TaskScore], theirs: Mapping[str, TaskScore], tasks: Sequence[str]
) -> list[Difference | None]:
    """Of each task, and of their mean."""
    pairs = {task: (ours[task].credits, theirs[task].credits) for task in tasks if task in ours and task in theirs}
    by_task = [paired_difference(*pairs[task]) if task in pairs else None for task in tasks]
    return [*by_task, mean_difference(pairs)]


def _cell(one: Difference | None, reach: float) -> str:
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
