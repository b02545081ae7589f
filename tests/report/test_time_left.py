"""The time that is left, from the pace so far, against numbers worked out by hand."""

from __future__ import annotations

import time

import pytest

from llava_cl.pipeline.progress import Event
from llava_cl.report.time_left import TimeLeft

PASSES = {
    0: {"protect": 0.0, "evaluate A": 10.0, "evaluate B": 30.0},
    1: {"measure": 20.0, "train": 100.0, "protect": 0.0, "evaluate A": 10.0, "evaluate B": 30.0},
    2: {"measure": 40.0, "train": 200.0, "protect": 0.0, "evaluate A": 10.0, "evaluate B": 30.0},
}


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def _told(left: TimeLeft, clock: Clock, *events: tuple[float, str, int, int], stage: int) -> None:
    """Events with the seconds that pass before each."""
    for seconds, step, done, total in events:
        clock.now += seconds
        left.event(Event(stage, step, done, total))


def test_of_a_whole_run(clock: Clock) -> None:
    left = TimeLeft(PASSES)
    left.stage_begins(0)
    assert left.left() == {}
    _told(left, clock, (7, "protect", 0, 0), (0, "protect", 0, 28), (3, "protect", 28, 28), stage=0)
    _told(left, clock, (0, "evaluate A", 0, 0), (0, "evaluate A", 0, 10), stage=0)
    assert left.left() == {}  # no pass was seen
    # 5 of 10 passes in 10 seconds: 2 seconds each. The bases of the base say nothing about later ones.
    _told(left, clock, (10, "evaluate A", 5, 10), stage=0)
    stage = 10 + 2 * 30
    later = (7 + 2 * 160) + (7 + 2 * 280)
    assert left.left() == pytest.approx({"step": 10, "stage": stage, "run": stage + later})
    # The other half takes 20 seconds: 3 seconds each.
    _told(left, clock, (20, "evaluate A", 10, 10), stage=0)
    assert left.left() == pytest.approx({"stage": 90, "run": 90 + 7 + 3 * 160 + 7 + 3 * 280})
    _told(left, clock, (0, "evaluate B", 0, 30), (90, "evaluate B", 30, 30), stage=0)
    left.stage_ends()
    assert left.left() == pytest.approx({"stage": 0, "run": 7 + 3 * 160 + 7 + 3 * 280})

    # Training has a pace of its own, 1 second; measuring, which was seen at 4, keeps its own too.
    left.stage_begins(1)
    _told(left, clock, (7, "measure", 0, 20), (80, "measure", 20, 20), (0, "train", 0, 2), stage=1)
    _told(left, clock, (50, "train", 1, 2), stage=1)
    stage = 50 + 3 * 40
    assert left.left() == pytest.approx({"step": 50, "stage": stage, "run": stage + 7 + 4 * 40 + 1 * 200 + 3 * 40})
    # Bases take 5 seconds, and as many in the next stage.
    _told(left, clock, (50, "train", 2, 2), (0, "protect", 0, 28), (5, "protect", 28, 28), stage=1)
    _told(left, clock, (0, "evaluate A", 0, 10), stage=1)
    assert left.left() == pytest.approx({"stage": 3 * 40, "run": 3 * 40 + 7 + 4 * 40 + 1 * 200 + 5 + 3 * 40})


def test_what_an_earlier_process_did_of_a_step_is_no_pace(clock: Clock) -> None:
    left = TimeLeft(PASSES)
    left.stage_begins(1)
    _told(left, clock, (5, "train", 0, 0), (5, "train", 900, 1000), stage=1)
    assert "step" not in left.left()
    _told(left, clock, (10, "train", 901, 1000), stage=1)
    # A step of 10 seconds has a tenth of a pass.
    assert left.left() == pytest.approx({"step": 990, "stage": 990 + 100 * 40, "run": 990 + 100 * 40 + 5 + 100 * 280})
    _told(left, clock, (990, "train", 1000, 1000), stage=1)
    left.stage_ends()
    assert left.left() == pytest.approx({"stage": 0, "run": 5 + 100 * 280})


def test_a_stage_that_is_continued_has_its_earlier_steps_behind_it(clock: Clock) -> None:
    left = TimeLeft(PASSES)
    left.stage_begins(2)
    _told(left, clock, (5, "evaluate A", 0, 10), (10, "evaluate A", 10, 10), stage=2)
    assert left.left() == pytest.approx({"stage": 30, "run": 30})


def test_of_what_was_not_planned_only_the_step_is_known(clock: Clock) -> None:
    left = TimeLeft({})
    left.stage_begins(3)
    _told(left, clock, (5, "evaluate A", 0, 20), (10, "evaluate A", 5, 20), stage=3)
    assert left.left() == pytest.approx({"step": 30})
