"""The accuracy matrix and the curves over the stages as PNG and PDF, for papers and slides."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llava_cl.report.heatmap import colour_top
from llava_cl.report.schema import Metrics, Row, first_probed
from llava_cl.report.text import percent
from llava_cl.store import atomic_path

DPI = 144
MUTED = "#6b7480"
DASHES = ("-", "--", ":", "-.")
PALETTE = LinearSegmentedColormap.from_list("page", ["#ffffff", "#6faac7"])
"""From white to the deepest cell of the page (`--heat` at `--depth` in style.css); black is readable on all of it."""


def write_figures(metrics: Metrics, folder: Path) -> list[Path]:
    """Write `accuracy_matrix.{png,pdf}` and `curves.{png,pdf}` into `folder`, once a row is known."""
    labels, rows = labelled_rows(metrics)
    if not rows:
        return []
    drawn = {"accuracy_matrix": matrix_figure(metrics, labels, rows), "curves": curves_figure(metrics, rows)}
    paths = []
    for name, figure in drawn.items():
        with atomic_path(folder / f"{name}.png") as file:
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        figure.set_layout_engine("none")  # keeps the layout of the first drawing, which costs the most
        with atomic_path(folder / f"{name}.pdf") as file:
            FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None})
        paths += [folder / f"{name}.png", folder / f"{name}.pdf"]
    return paths


def matrix_figure(metrics: Metrics, labels: list[str], rows: list[Row]) -> Figure:
    """The matrix as a heat map with its numbers, cells of just-learned tasks framed."""
    tasks = metrics.tasks
    figure = Figure(figsize=(1.6 + 0.9 * len(tasks), 1.2 + 0.42 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.array(rows, float), cmap=PALETTE, norm=Normalize(0, colour_top(rows)), aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            number = axes.text(j, i, percent(value), ha="center", va="center", fontsize=8)
            number.set_in_layout(False)  # laying out hundreds of numbers takes longer than drawing them
    for task in range(len(metrics.matrix)):
        corner = task - 0.48, task + 1 - metrics.first_stage - 0.46
        axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor="black", linewidth=1.2))
    axes.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=25, ha="left", parse_math=False)
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def curves_figure(metrics: Metrics, rows: list[Row]) -> Figure:
    """Accuracy of every task over the stages; beside it the base's own questions, where there are any."""
    probes = metrics.probes
    beside = bool(probes.rows and probes.names)
    figure = Figure(figsize=(11 if beside else 6.4, 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2 if beside else 1, sharey=True, squeeze=False)[0]
    _curves(panels[0], metrics.tasks, rows, metrics.first_stage, "Accuracy by task (percent)")
    for number, (row, colour) in enumerate(zip(metrics.matrix, _colours(len(metrics.tasks)), strict=False)):
        if row[number] is not None:
            panels[0].plot(number + 1, row[number], "o", color=colour, markersize=4)
    if beside:
        _curves(panels[1], probes.names, probes.rows, first_probed(metrics), "The base's own questions")
    return figure


def labelled_rows(metrics: Metrics) -> tuple[list[str], list[Row]]:
    """The rows of accuracies that there are, and what each is called."""
    names = ["base", *(f"{number} {task}" for number, task in enumerate(metrics.tasks, start=1))]
    return names[metrics.first_stage :][: len(metrics.rows)], metrics.rows


def _curves(axes: Axes, names: list[str], rows: list[Row], first: int, title: str) -> None:
    stages = range(first, first + len(rows))
    columns = np.array(rows, float).T
    for name, values, colour, style in zip(names, columns, _colours(len(names)), cycle(DASHES), strict=False):
        axes.plot(stages, values, style, color=colour, linewidth=1.5, label=name)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks(stages, ["base" if stage == 0 else str(stage) for stage in stages], fontsize=8)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.6)
    legend = axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.spines[:].set_visible(False)


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    """From dark to light, as people with any colour vision see them; neighbours have other dashes too."""
    return [colormaps["cividis"](0.9 * index / max(count - 1, 1)) for index in range(count)]
