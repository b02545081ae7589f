"""The figures: files of the right kind, numbers that are there, names taken literally."""

import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from report_runs import TASKS, metrics

from llava_cl.report.figures import PALETTE, curves_figure, matrix_figure, write_figures
from llava_cl.report.load import parse_metrics


@pytest.mark.filterwarnings("error")
def test_files_and_their_kinds(tmp_path: Path) -> None:
    paths = write_figures(parse_metrics(metrics(6, ["$x^{$", *TASKS[1:]])), tmp_path)
    assert [path.name for path in paths] == ["accuracy_matrix.png", "accuracy_matrix.pdf", "curves.png", "curves.pdf"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert write_figures(parse_metrics({"format": 1, "tasks": ["a"]}), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_matrix_holds_every_number_and_frames_the_diagonal() -> None:
    content = parse_metrics(metrics(2))
    figure = matrix_figure(content, ["base", "1", "2"], [content.base_row, *content.matrix])
    (axes,) = figure.axes
    shown = [text.get_text() for text in axes.findobj(Text)]
    for value in ("16.3", "91.1", "93.8", "44.2"):
        assert value in shown
    assert [(round(box.get_x() + 0.48), round(box.get_y() + 0.46)) for box in axes.patches] == [(0, 1), (1, 2)]


def test_curves_are_at_their_stages() -> None:
    content = parse_metrics({**metrics(3), "base_row": None})
    figure = curves_figure(content, content.matrix)
    tasks, probes = figure.axes
    assert list(tasks.lines[0].get_xdata()) == [1, 2, 3]
    assert list(tasks.lines[0].get_ydata()) == [91.07, 90.53, 90.33]
    assert list(probes.lines[0].get_xdata()) == [0, 1, 2, 3]


def test_curves_of_many_tasks_are_told_apart_without_colour() -> None:
    """Curves of one dash differ in lightness, which people with any colour vision see."""
    names = [f"T{number}" for number in range(20)]
    content = parse_metrics({"format": 1, "tasks": names, "matrix": [[50.0] * 20]})
    lines = curves_figure(content, content.matrix).axes[0].lines[:20]
    looks = [(line.get_linestyle(), np.dot((0.2, 0.7, 0.1), line.get_color()[:3])) for line in lines]
    assert len(set(looks)) == 20
    for dash in {dash for dash, _ in looks}:
        grey = sorted(lightness for own, lightness in looks if own == dash)
        assert min(b - a for a, b in pairwise(grey)) > 0.1


def test_the_matrix_has_the_palette_of_the_page() -> None:
    style = files("llava_cl.report").joinpath("style.css").read_text(encoding="utf-8")
    heat, depth = re.search(r"--heat: (.*?); --depth: (.*?);", style).groups()
    deepest = [1 - (1 - int(part) / 255) * float(depth) for part in heat.split()]
    assert PALETTE(1.0)[:3] == pytest.approx(deepest, abs=0.01)
    assert PALETTE(0.0)[:3] == (1, 1, 1)
