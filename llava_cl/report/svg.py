"""Small inline SVG charts, drawn by hand so that the page needs no script and no second file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llava_cl.report.text import escape

WIDTH = 200
HEIGHT = 104
LEFT, RIGHT, TOP, BOTTOM = 26, 8, 6, 16
LEVELS = 25
MAX_POINTS = 300

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Frame:
    """The data ranges of a line chart, and the text under them: x position -> label, y position -> label."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: Mapping[float, str]
    y_ticks: Mapping[float, str]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a data point; values beyond the range are drawn on its edge."""
        across = LEFT + _share(x, self.x_range) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - _share(y, self.y_range) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)


def ghost_lines(identifier: str, frame: Frame, lines: Sequence[Sequence[Point]]) -> str:
    """An invisible SVG that defines `lines` once, for `line_chart(ghosts=identifier)` to show faintly."""
    drawn = "".join(_polylines(frame, line, "ghost") for line in lines)
    return f'<svg class="defs" width="0" height="0"><defs><g id="{escape(identifier)}">{drawn}</g></defs></svg>'


def line_chart(
    frame: Frame, points: Sequence[Point], label: str, *, learned: float | None = None, ghosts: str | None = None
) -> str:
    """One line over its axes.

    Args:
        points: `(x, y)` in order of x; y None or not finite leaves a gap.
        label: what a screen reader says.
        learned: the line is dashed before this x, and a rule marks it.
        ghosts: identifier of lines defined by `ghost_lines` with the same frame.
    """
    parts = [_axes(frame)]
    if ghosts is not None:
        parts.append(f'<use href="#{escape(ghosts)}"/>')
    if learned is None:
        parts.append(_polylines(frame, points, "line"))
    else:
        x, _ = frame.at(learned, frame.y_range[0])
        parts.append(f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_polylines(frame, [point for point in points if point[0] <= learned], "line before"))
        parts.append(_polylines(frame, [point for point in points if point[0] >= learned], "line"))
    shown = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if shown:
        x, y = frame.at(*shown[-1])
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.6"/>')
    return _svg(HEIGHT, label, "".join(parts))


def fill_map(rows: Sequence[tuple[str, Sequence[float | None]]], ends: tuple[str, str], label: str) -> str:
    """A grid of shares: one row per stage, one column per block, the mean of each row at the right.

    Args:
        rows: `(label, shares)`, shares 0 to 1 or None, all of one length.
        ends: labels under the first and the last column.
        label: what a screen reader says.
    """
    left, right, cell = 22, 36, 13
    columns = max(len(shares) for _, shares in rows)
    width = (WIDTH - left - right) / columns
    cells: dict[int, list[str]] = {}
    texts = []
    for index, (name, shares) in enumerate(rows):
        top = index * cell
        for column, share in enumerate(shares):
            if share is not None:
                box = f"M{left + column * width:.1f} {top}h{width:.1f}v{cell - 1}h-{width:.1f}z"
                cells.setdefault(round(min(max(share, 0.0), 1.0) * LEVELS), []).append(box)
        texts.append(_text(left - 5, top + cell - 3.5, name, "end"))
        if known := [share for share in shares if share is not None]:
            texts.append(_text(WIDTH, top + cell - 3.5, f"{100 * sum(known) / len(known):.1f}%", "end"))
    height = len(rows) * cell
    grid = f'<path class="slot" d="M{left} 0h{WIDTH - left - right}v{height - 1}H{left}z"/>' + "".join(
        f'<path class="fill" fill-opacity="{level / LEVELS:.2f}" d="{"".join(boxes)}"/>'
        for level, boxes in sorted(cells.items())
    )
    texts.append(_text(left, height + 10, ends[0], "start"))
    if columns > 1:
        texts.append(_text(WIDTH - right, height + 10, ends[1], "end"))
    return _svg(height + 14, label, grid + "".join(texts))


def downsample(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of an equal run of neighbours; non-finite values stay visible."""
    count = len(points)
    if count <= limit:
        return list(points)
    edges = [count * index // limit for index in range(limit + 1)]
    return [
        (sum(x for x, _ in points[start:end]) / (end - start), sum(y for _, y in points[start:end]) / (end - start))
        for start, end in pairwise(edges)
    ]


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)


def _polylines(frame: Frame, points: Sequence[Point], style: str) -> str:
    runs: list[list[str]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append("{} {}".format(*frame.at(x, y)))
    return "".join(f'<path class="{style}" d="M{"L".join(run)}"/>' for run in runs if len(run) > 1)


def _axes(frame: Frame) -> str:
    parts = []
    for value, name in frame.y_ticks.items():
        _, y = frame.at(frame.x_range[0], value)
        parts.append(f'<path class="rule" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>' + _text(LEFT - 5, y + 3.3, name, "end"))
    for value, name in frame.x_ticks.items():
        x, _ = frame.at(value, frame.y_range[0])
        parts.append(_text(x, HEIGHT - 3, name, "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, label: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
