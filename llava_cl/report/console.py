"""The accuracy matrix and the summary metrics as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from llava_cl.evaluation.metrics import mean
from llava_cl.pipeline.data_checks import TaskData
from llava_cl.pipeline.planning import Needs
from llava_cl.report.load import parse_metrics
from llava_cl.report.schema import Metrics
from llava_cl.report.text import duration, memory, metric, percent, shown
from llava_cl.terminal import printable


def console_table(metrics: Metrics | Mapping[str, Any]) -> Table:
    """The accuracy matrix: the base's row, then one row for every stage, the diagonal in bold.

    Columns have the tasks' numbers, rows their names too, so that six tasks fit on 80 characters.

    Args:
        metrics: the content of a metrics.json.

    Raises:
        InputError: it does not follow the schema.
    """
    metrics = parse_metrics(metrics)
    tasks = range(len(metrics.tasks))
    table = _table("Accuracy (percent)", "after", *(str(task + 1) for task in tasks), "seen")
    table.columns[0].no_wrap = True
    if metrics.base_row is not None:
        table.add_row("0 base", *(percent(value, 2) for value in metrics.base_row), "", style="dim")
    for stage, name in enumerate(metrics.tasks):
        row = metrics.matrix[stage] if stage < len(metrics.matrix) else [None for _ in tasks]
        cells = [
            _text(percent(value, 2), style="bold" if task == stage else "dim" if task > stage else "")
            for task, value in enumerate(row)
        ]
        table.add_row(_text(f"{stage + 1} {name}"), *cells, percent(mean(row[: stage + 1]), 2))
    return table


def data_tree(root: Path, paths: Sequence[Path]) -> Tree:
    """The files and folders that a run reads below the data root, those that are missing in red."""
    tree = Tree(_text(str(root)))
    branches = {root: tree}
    for path in sorted(set(paths)):
        for folder in reversed(path.relative_to(root).parents):
            place = root / folder
            if place not in branches:
                branches[place] = branches[place.parent].add(_text(f"{place.name}/"))
        if path not in branches:
            missing = not path.exists()
            label = _text(path.name + (" (missing)" if missing else ""), style="red" if missing else "")
            branches[path] = branches[path.parent].add(label)
    return tree


def data_table(found: Sequence[TaskData]) -> Table:
    """Records and images of each task."""
    table = Table(title="Data", title_justify="left")
    for heading in ("task", "file", "records", "images"):
        table.add_column(heading, justify="right" if heading in {"records", "images"} else "left")
    for data in found:
        for number, (name, records) in enumerate(data.records.items()):
            task, images = (data.task.name, str(data.images)) if number == 0 else ("", "")
            table.add_row(_text(task), _text(name), str(records), images, end_section=number == len(data.records) - 1)
    return table


def needs_tables(needs: Needs) -> list[Table]:
    """What a run will need: memory of a rank by step, disk, and time."""
    tokens = f", samples of {needs.size.length} tokens" if needs.size.length > 1 else ""
    most = _table(f"Memory of each of {needs.ranks} ranks{tokens}", "", *needs.memory)
    disk = _table("Disk, at the most", "", "bytes")
    for part in dict.fromkeys(part for parts in needs.memory.values() for part in parts):
        most.add_row(part, *(memory(parts.get(part)) for parts in needs.memory.values()))
    most.add_row("together", *(memory(sum(parts.values())) for parts in needs.memory.values()), style="bold")
    for part, size in needs.disk.items():
        disk.add_row(part, memory(size))
    disk.add_row("together", memory(sum(needs.disk.values())), style="bold")
    if not needs.seconds:
        return [most, disk]
    title = "Forward and backward passes of all stages, estimated from this machine's rate of matrix products"
    passes = _table(title, None, *needs.seconds)
    passes.add_row(*(duration(seconds) for seconds in needs.seconds.values()))
    return [most, disk, passes]


def _table(title: str, first: str | None, *numbers: str) -> Table:
    """A table with the headings of a column of names, if there is one, and of columns of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    if first is not None:
        table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _text(text: str, style: str = "") -> Text:
    """A text as it is, without markup."""
    return Text(printable(text), style)


def scores_table(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Scores by task and stage, the strict ones in brackets where there are any.

    Args:
        results: stage -> task -> `{"score", "strict_score"}` in percent.
    """
    table = _table("Scores (percent)", "stage", *map(str, results))
    for task in next(iter(results.values())):
        cells = []
        for score in (by_task[task] for by_task in results.values()):
            strict = "" if score["strict_score"] is None else f" ({percent(score['strict_score'], 2)})"
            cells.append(percent(score["score"], 2) + strict)
        table.add_row(_text(task), *cells)
    return table


def summary_table(metrics: Metrics | Mapping[str, Any]) -> Table:
    """The summary metrics with their definitions; takes and raises what `console_table` does."""
    metrics = parse_metrics(metrics)
    table = _table(f"Metrics after {len(metrics.matrix)} of {len(metrics.tasks)} stages", "metric", "value")
    table.columns[0].style = "bold"
    table.add_column("definition", style="dim")
    summary = metrics.summary or {}
    for name, meaning in shown([summary]).items():
        table.add_row(name, metric(name, summary.get(name)), meaning)
    return table
