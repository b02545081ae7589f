"""The live display degrades to plain lines that say stage, step and the time that is left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event
from llava_cl.report.live import LiveDisplay
from llava_cl.report.watchers import Watchers

METRICS = {"tasks": ["Colour", "Tone"], "matrix": [[50.0, 25.0]], "base_row": [10.0, 0.0]}
EVENTS = {
    "checking": ("records",),
    "note": ("a note",),
    "plans": ({1: {"train": 10.0}},),
    "stage_begins": (1, "Colour", 3),
    "event": (Event(1, "train", 5, 10),),
    "stage_ends": (1, METRICS),
}
"""What a watcher is told, and an example of each."""


def lines_of(*, terminal: bool) -> str:
    stream = io.StringIO()
    with LiveDisplay(Console(file=stream, force_terminal=terminal, width=100)) as display:
        display.checking("records of Colour")
        display.plans({stage: {"train": 10.0} for stage in (1, 2, 3)})
        display.stage_begins(1, "Colour", 3)
        display.event(Event(1, "train", 0, 0))
        display.event(Event(1, "train", 5, 10))
        display.event(Event(1, "train", 10, 10))
        display.stage_ends(1, METRICS)
    return stream.getvalue()


def test_log_file_gets_one_plain_line_for_each_step() -> None:
    text = lines_of(terminal=False)
    assert "\x1b" not in text
    assert text.count("stage 1/3 Colour: train") == 1
    assert "checking records of Colour" in text
    assert "Colour 50.0, Tone 25.0" in text
    assert "done in 0:00, about 0:00 left." in text


def test_the_time_left_in_a_step_is_told_before_any_stage_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 90))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with LiveDisplay(Console(file=stream, width=100)) as display:
        display.stage_begins(1, "Colour", 3)
        display.event(Event(1, "train", 0, 0))
        display.event(Event(1, "train", 0, 10))
        display.event(Event(1, "train", 5, 10))
    (line,) = [line for line in stream.getvalue().splitlines() if "5/10" in line]
    assert line.endswith(" left")


def test_several_watchers_are_told_all_of_it_in_their_order() -> None:
    told: list[tuple[object, ...]] = []

    def noting(who: str) -> Watcher:
        watcher = Watcher()
        for name in EVENTS:
            setattr(watcher, name, lambda *what, name=name: told.append((who, name, *what)))
        return watcher

    watchers = Watchers(noting("first"), noting("second"))
    for name, what in EVENTS.items():
        getattr(watchers, name)(*what)
    assert EVENTS.keys() == {name for name in vars(Watcher) if not name.startswith("_")}
    assert told == [(who, name, *what) for name, what in EVENTS.items() for who in ("first", "second")]


def test_terminal_gets_a_bar_with_amounts() -> None:
    assert "10/10" in lines_of(terminal=True)
