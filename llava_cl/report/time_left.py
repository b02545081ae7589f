"""The time that is left of a step, a stage and a run, from the pace so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from llava_cl.pipeline.progress import Event

_START = "start"
"""From a stage's beginning to its first step: processes start, the model is read."""


@dataclass
class _Seen:
    """What was done of one kind of step."""

    seconds: float = 0.0
    passes: float = 0.0
    times: int = 0

    def __add__(self, other: _Seen) -> _Seen:
        return _Seen(self.seconds + other.seconds, self.passes + other.passes, self.times + other.times)


class TimeLeft:
    """Told of stages and events as they come, it extrapolates.

    The steps of a kind (measuring, training, evaluations) take time in proportion to their passes; a kind that was not
    seen yet goes at the pace of all passes seen. A step without passes takes as long as those of its kind did, on
    average, and counts as nothing before one was seen.

    Args:
        passes: of each stage to come, see `llava_cl.pipeline.passes.count_passes`.
    """

    def __init__(self, passes: Mapping[int, Mapping[str, float]]) -> None:
        self._passes = {stage: {_START: 0.0, **steps} for stage, steps in passes.items()}
        self._seen: defaultdict[str, _Seen] = defaultdict(_Seen)
        self._stage = 0
        self._step = ""
        self._begin = self._share = 0.0
        self._before: float | None = None
        """The share of the step that an earlier process did; None before the step tells of it."""

    def stage_begins(self, stage: int) -> None:
        """A stage's job starts."""
        self._ends()
        self._stage = stage
        self._begins(_START)

    def event(self, event: Event) -> None:
        """A step began or got further; the first time that it tells how far it is, it has done nothing here yet."""
        if event.step != self._step:
            self._ends()
            self._begins(event.step)
        if event.total:
            self._share = event.done / event.total
            if self._before is None:
                self._before, self._begin = self._share, time.monotonic()

    def stage_ends(self) -> None:
        """A stage is committed."""
        self._ends()
        self._begins("")

    def left(self) -> dict[str, float]:
        """Seconds of "step", "stage" and "run", as far as they can be told."""
        known = {}
        if (self._before or 0.0) < self._share < 1:
            known["step"] = self._of_step() or 0.0
        if self._stage in self._passes:
            steps = list(self._passes[self._stage])
            later = steps[steps.index(self._step) + 1 :] if self._step in steps else []
            stage = _sum([self._of_step(), *(self._expected(self._stage, step) for step in later)])
            rest = [self._expected(n, step) for n in self._passes if n > self._stage for step in self._passes[n]]
            run = _sum([stage, *rest])
            known |= {name: left for name, left in (("stage", stage), ("run", run)) if left is not None}
        return known

    def _begins(self, step: str) -> None:
        self._step, self._begin, self._share, self._before = step, time.monotonic(), 0.0, None

    def _ends(self) -> None:
        if self._step:
            self._seen[_kind(self._stage, self._step)] += self._under_way()

    def _of_step(self) -> float | None:
        """Seconds that are left of the step under way."""
        if not self._step:
            return 0.0
        done = self._share - (self._before or 0.0)
        if done:
            return self._under_way().seconds / done * (1 - self._share)
        whole = self._expected(self._stage, self._step)
        return None if whole is None else whole * (1 - self._share)

    def _under_way(self) -> _Seen:
        """What was done of the step under way."""
        passes = self._passes.get(self._stage, {}).get(self._step, 0.0)
        return _Seen(time.monotonic() - self._begin, (self._share - (self._before or 0.0)) * passes, 1)

    def _expected(self, stage: int, step: str) -> float | None:
        """Seconds of a whole step; None if no pace is known."""
        passes = self._passes[stage].get(step, 0.0)
        seen = self._seen.copy()
        own = seen[_kind(stage, step)]
        if not passes:
            return own.seconds / own.times if own.times else 0.0
        if self._share:
            seen[_kind(self._stage, self._step)] += self._under_way()
        own = seen[_kind(stage, step)]
        pace = own if own.passes else sum((each for each in seen.values() if each.passes), _Seen())
        return passes * pace.seconds / pace.passes if pace.passes else None


def _sum(seconds: list[float | None]) -> float | None:
    return None if None in seconds else sum(each or 0.0 for each in seconds)


def _kind(stage: int, step: str) -> str:
    """What steps at one pace have in common: their first word; the bases that come first are far larger than others."""
    return f"{'base ' if stage == 0 and step == 'protect' else ''}{step.partition(' ')[0]}"
