"""The figures: files of the right kind, numbers that are there, names taken literally."""

from pathlib import Path

import pytest
from matplotlib.text import Text
from report_runs import TASKS, metrics

from llava_cl.report.figures import curves_figure, matrix_figure, write_figures
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
