"""Accuracies as an HTML table whose cells are coloured by their value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava_cl.evaluation.metrics import mean
from llava_cl.report.schema import Row
from llava_cl.report.text import MISSING, escape, percent, signed

NOTABLE_LOSS = -1.0
"""Changes since a task was learned from here down are set in bold, in points."""

DENSE_COLUMNS = 11


def accuracy_table(
    tasks: Sequence[str],
    matrix: Sequence[Row],
    base_row: Row | None = None,
    majority: Mapping[str, float | None] | None = None,
) -> str:
    """The accuracy matrix, the base's row on top; below the diagonal the change since the task was learned.

    Args:
        tasks: the stream in order; stages that `matrix` does not hold yet are drawn empty.
        matrix: percent, `matrix[stage][task]`.
        base_row: the untouched base's accuracies, in percent.
        majority: the score of the best constant answer to each task, in percent.
    """
    top = colour_top([*matrix, base_row or []])
    rows = []
    if base_row is not None:
        rows.append(heat_row("base", heat_cells(base_row, top), style="base"))
    for stage, task in enumerate(tasks):
        head = f'{stage + 1} <span class="wide">{escape(task)}</span>'
        if stage < len(matrix):
            row = matrix[stage]
            cells = "".join(_matrix_cell(matrix, stage, column, top) for column in range(len(row)))
            rows.append(heat_row(head, cells, percent(mean(row[: stage + 1]))))
        else:
            cells = "".join(f"<td{_class(stage, column)}></td>" for column in range(len(tasks)))
            rows.append(heat_row(head, cells, style="ahead"))
    if majority:
        cells = "".join(f"<td>{percent(majority.get(task))}</td>" for task in tasks)
        rows.append(heat_row("majority", cells, style="floor"))
    key = (
        f'<p class="key"><span>0</span><i class="ramp"></i><span>{percent(top)}</span>'
        '<i class="box"></i><span>just learned</span></p>'
    )
    return heat_table("after", tasks, "seen so far", rows, style="stages") + key


def heat_table(corner: str, columns: Sequence[str], last: str, rows: Sequence[str], style: str) -> str:
    """A table of `heat_row` rows, set closer where there are many columns; the heads are escaped here."""
    spacing = " dense" if len(columns) > DENSE_COLUMNS else ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    return (
        f'<div class="scroll"><table class="heat {style}{spacing}"><thead><tr>{heads}'
        f'<th scope="col" class="mean">{escape(last)}</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def heat_row(head: str, cells: str, last: str = "", style: str = "") -> str:
    """One row; all but `last` is HTML."""
    name = f' class="{style}"' if style else ""
    return f'<tr{name}><th scope="row">{head}</th>{cells}<td class="mean">{escape(last)}</td></tr>'


def heat_cells(values: Sequence[float | None], top: float) -> str:
    """Coloured cells on the scale 0 to `top`."""
    return "".join(_cell(value, top) for value in values)


def colour_top(rows: Sequence[Sequence[float | None]]) -> float:
    """The value of the deepest colour: the largest there is, at least 1."""
    return max((value for row in rows for value in row if value is not None and value > 1.0), default=1.0)


def _matrix_cell(matrix: Sequence[Row], stage: int, task: int, top: float) -> str:
    value = matrix[stage][task]
    learned = matrix[task][task] if task < stage else None
    change = ""
    if value is not None and learned is not None:
        style = ' class="loss"' if value - learned <= NOTABLE_LOSS else ""
        change = f"<small{style}>{signed(value - learned)}</small>"
    return _cell(value, top, _class(stage, task), change)


def _class(stage: int, task: int) -> str:
    if task == stage:
        return ' class="now"'
    return ' class="unseen"' if task > stage else ""


def _cell(value: float | None, top: float, attributes: str = "", extra: str = "") -> str:
    if value is None:
        return f"<td{attributes}>{MISSING}</td>"
    depth = min(max(value / top, 0.0), 1.0)
    return f'<td{attributes} style="--a:{depth:.3f}">{percent(value)}{extra}</td>'
