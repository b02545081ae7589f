"""Numbers as text."""

import pytest

from llava_cl.evaluation.metrics import mean
from llava_cl.report.text import duration, memory, metric, percent, signed


def test_percent_and_signed() -> None:
    assert (percent(None), percent(93.84), percent(-1.25, 2)) == ("–", "93.8", "−1.25")
    assert (signed(None), signed(0.44), signed(-0.04), signed(0.04), signed(-2.5)) == (
        "–",
        "+0.4",
        "0.0",
        "0.0",
        "−2.5",
    )
    assert (metric("BWT", 1.0), metric("Forgetting", 1.0)) == ("+1.00", "1.00")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 m 00 s"),
        (250, "4 m 10 s"),
        (3599.6, "1 h 00 m"),
        (7530, "2 h 06 m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory() -> None:
    assert (memory(None), memory(512 * 2**20), memory(71 * 2**30 + 2**29)) == ("–", "512 MiB", "71.5 GiB")


def test_mean_is_unknown_where_a_value_is() -> None:
    assert mean([1.0, 3.0]) == 2.0
    assert mean([1.0, None]) is None
    assert mean([]) is None
