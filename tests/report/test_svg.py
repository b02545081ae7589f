"""The hand-drawn charts: positions worked out by hand, gaps, and what stays readable."""

import math
from xml.etree import ElementTree

import pytest

from llava_cl.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Frame, downsample, fill_map, line_chart

FRAME = Frame((0, 10), (0.0, 100.0), {0: "0", 10: "10"}, {0.0: "0", 100.0: "100"})


def lines_of(chart: str, style: str) -> list[str]:
    return [path.get("d", "") for path in ElementTree.fromstring(chart).iter("path") if path.get("class") == style]


def test_corners_and_middle() -> None:
    assert FRAME.at(0, 0) == (LEFT, HEIGHT - BOTTOM)
    assert FRAME.at(10, 100) == (WIDTH - RIGHT, TOP)
    assert FRAME.at(5, 50) == (LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2)
    assert FRAME.at(20, -5) == (WIDTH - RIGHT, HEIGHT - BOTTOM)


def test_unknown_and_non_finite_values_leave_gaps() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 4.0), (4, 5.0), (5, math.nan), (6, math.inf), (7, 3.0), (8, 2.0)]
    assert len(lines_of(line_chart(FRAME, points, "x"), "line")) == 3


def test_line_is_dashed_up_to_the_stage_that_learned_it() -> None:
    chart = line_chart(FRAME, [(x, 10.0 * x) for x in range(11)], "x", learned=4)
    (before,), (after,) = lines_of(chart, "line before"), lines_of(chart, "line")
    turn = "{} {}".format(*FRAME.at(4, 40))
    assert before.endswith(turn)
    assert after.startswith("M" + turn)


@pytest.mark.parametrize("points", [[], [(3, None)], [(3, 5.0)]])
def test_charts_of_almost_nothing(points: list[tuple[float, float | None]]) -> None:
    ElementTree.fromstring(line_chart(FRAME, points, 'a "label" <with> marks'))


def test_downsampling_keeps_the_mean_and_the_limit() -> None:
    points = [(float(step), math.sin(step)) for step in range(3000)]
    kept = downsample(points, 300)
    assert len(kept) == 300
    assert sum(y for _, y in kept) / 300 == pytest.approx(sum(y for _, y in points) / 3000)
    assert kept[0] == (4.5, pytest.approx(sum(math.sin(step) for step in range(10)) / 10))
    assert len(downsample(points[:301], 300)) == 300
    assert downsample(points[:300], 300) == points[:300]


def test_downsampling_does_not_hide_a_divergence() -> None:
    points = [(float(step), math.nan if step == 777 else 1.0) for step in range(1000)]
    assert sum(math.isnan(y) for _, y in downsample(points)) == 1


def test_fill_map_deepens_with_the_share_and_states_the_mean() -> None:
    tree = ElementTree.fromstring(fill_map([("1", [0.0, 0.5]), ("2", [0.5, None])], ("0", "1"), "x"))
    boxes = {
        float(path.get("fill-opacity", "nan")): path.get("d", "").count("z")
        for path in tree.iter("path")
        if path.get("class") == "fill"
    }
    assert boxes == {0.0: 1, 0.48: 2}  # a half is level 12 of 25
    assert [text.text for text in tree.iter("text")] == ["1", "25.0%", "2", "50.0%", "0", "1"]
