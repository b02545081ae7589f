"""Small multiples of lines: accuracy and retention over the stages, and the training loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llava_cl.report.document import panel, panels
from llava_cl.report.schema import Row
from llava_cl.report.svg import Frame, Point, downsample, ghost_lines, line_chart
from llava_cl.report.text import percent


def stage_panels(
    names: Sequence[str],
    lines: Sequence[Sequence[Point]],
    stages: tuple[int, int],
    identifier: str,
    *,
    learned: bool = False,
) -> str:
    """One panel for each line of accuracies over the stages, the other lines faint behind it.

    Args:
        names: what each line shows.
        lines: `(stage, percent)` points of each line; not all of the stages need to be there.
        stages: first and last stage of the axis; stage 0 is the base.
        identifier: of the faint lines, unique on the page.
        learned: line number i, from 1, is of the task learned in stage i, which is marked.
    """
    frame = _stage_frame(stages, [value for line in lines for _, value in line])
    drawn = []
    for number, (name, line) in enumerate(zip(names, lines, strict=True), start=1):
        label = f"{name}: accuracy by stage"
        chart = line_chart(frame, line, label, learned=number if learned else None, ghosts=identifier)
        drawn.append(panel(name, percent(line[-1][1] if line else None), chart))
    return ghost_lines(identifier, frame, lines) + panels(drawn)


def columns_over_stages(rows: Sequence[Row], first: int) -> list[list[Point]]:
    """The columns of a matrix as lines over the stages `first`, `first + 1`, ..."""
    return [list(enumerate(column, start=first)) for column in zip(*rows, strict=True)]


def loss_panel(title: str, losses: Mapping[int, float]) -> str:
    """The training loss of one stage over its steps, from 0 to its largest value; the last one in numbers."""
    points = downsample(list(losses.items()))
    top = max((loss for _, loss in points if math.isfinite(loss)), default=0.0) or 1.0
    first, last = points[0][0], points[-1][0]
    frame = Frame((first, last), (0.0, top), {first: f"{first:.0f}", last: f"{last:.0f}"}, {0: "0", top: f"{top:.2g}"})
    broken = sum(not math.isfinite(loss) for loss in losses.values())
    value = f"{points[-1][1]:.3f}" + (f", {broken} not finite" if broken else "")
    return panel(title, value, line_chart(frame, points, f"{title}: training loss by step"))


def _stage_frame(stages: tuple[int, int], values: Sequence[float | None]) -> Frame:
    """Axes from 0 to 100 percent, or further where a score goes beyond."""
    first, last = stages
    top = max((value for value in values if value is not None), default=0.0)
    top = 100.0 if top <= 100 else math.ceil(top / 50) * 50.0
    step = max(1, math.ceil((last - first) / 6))
    names = {float(stage): str(stage) if stage else "base" for stage in range(first, last + 1, step)}
    return Frame(stages, (0.0, top), names, {value: f"{value:.0f}" for value in (0.0, top / 2, top)})
