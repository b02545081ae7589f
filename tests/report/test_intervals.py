"""Bootstrap intervals against a plain resampling of the questions, and against what is known of their coverage."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
from answered_runs import reference, write_answered_run
from report_html import check_page

from llava_cl.report import compare_runs
from llava_cl.report.intervals import Difference, mean_difference, paired_difference


def resampled(differences: list[np.ndarray], resamples: int = 20_000) -> tuple[float, float]:
    """The 2.5 and 97.5 percent points of the mean over tasks, questions drawn one by one."""
    generator = np.random.default_rng(7)
    means = np.zeros(resamples)
    for values in differences:
        for index in range(resamples):
            means[index] += generator.choice(values, len(values)).mean() / len(differences)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def credits(values: np.ndarray) -> dict[str, float]:
    return {f"q{index}": float(value) for index, value in enumerate(values)}


@pytest.mark.parametrize("graded", [False, True])
def test_interval_of_one_task_is_that_of_a_plain_bootstrap(graded: bool) -> None:
    generator = np.random.default_rng(1)
    ours, theirs = generator.random(150), generator.random(150)
    if not graded:
        ours, theirs = (ours < 0.8).astype(float), (theirs < 0.6).astype(float)
    found = paired_difference(credits(ours), credits(theirs))
    assert found is not None
    low, high = resampled([100 * (ours - theirs)])
    assert found.mean == pytest.approx(100 * (ours.mean() - theirs.mean()))
    assert found.low == pytest.approx(low, abs=0.7)
    assert found.high == pytest.approx(high, abs=0.7)


def test_pairing_counts() -> None:
    """Two runs that differ on two questions are told apart far better than by their accuracies alone."""
    ours = np.array([1.0] * 100 + [0.0] * 100)
    theirs = ours.copy()
    theirs[:2] = 0
    found = paired_difference(credits(ours), credits(theirs))
    assert found is not None
    assert found.high - found.low <= 3.0
    assert 2 * 1.96 * 100 * math.sqrt(2 * 0.25 / 200) > 19  # the interval of independent samples


def test_mean_over_tasks_counts_every_task_alike() -> None:
    generator = np.random.default_rng(2)
    sizes = {"small": 40, "large": 400}
    drawn = {
        name: [(generator.random(size) < share).astype(float) for share in (0.9, 0.5)] for name, size in sizes.items()
    }
    found = mean_difference({name: (credits(a), credits(b)) for name, (a, b) in drawn.items()})
    assert found is not None
    differences = [100 * (a - b) for a, b in drawn.values()]
    low, high = resampled(differences, 5000)
    assert found.mean == pytest.approx(sum(each.mean() for each in differences) / 2)
    assert found.low == pytest.approx(low, abs=1.0)
    assert found.high == pytest.approx(high, abs=1.0)


def test_tasks_are_resampled_independently() -> None:
    """The mean of nine alike tasks has a third of the interval; with one stream for all it had the whole."""
    values = (np.random.default_rng(4).random((2, 300)) < [[0.7], [0.5]]).astype(float)
    pair = credits(values[0]), credits(values[1])
    one, nine = paired_difference(*pair), mean_difference({f"task {number}": pair for number in range(9)})
    assert one is not None and nine is not None
    assert (nine.high - nine.low) * 3 == pytest.approx(one.high - one.low, rel=0.05)


def test_a_task_has_the_stream_of_its_name() -> None:
    """The same page is written by every process, whatever other tasks there are."""
    ours, theirs = {"a": 1.0, "b": 0.5, "c": 1.0, "d": 0.0}, {"a": 0.0, "b": 0.5, "c": 1.0, "d": 0.5}
    seed = int.from_bytes(hashlib.sha256(b"VizWiz").digest()[:8], "little")
    generator, shares = np.random.default_rng(seed), [0.25, 0.5, 0.25]
    drawn = np.concatenate([generator.multinomial(4, shares, size=500) @ [-50.0, 0.0, 100.0] for _ in range(20)]) / 4
    found = mean_difference({"VizWiz": (ours, theirs)})
    assert found == pytest.approx((12.5, *np.quantile(drawn, [0.025, 0.975])))


@pytest.mark.parametrize(
    ("low", "high", "clear"),
    [(0.1, 2.0, True), (-2.0, -0.1, True), (-1.0, 1.0, False), (0.0, 2.0, False), (-2.0, 0.0, False)],
)
def test_clear_is_what_leaves_zero_out(low: float, high: float, clear: bool) -> None:
    assert Difference(0.5, low, high).clear is clear


def test_order_of_questions_and_calls_changes_nothing() -> None:
    ours, theirs = {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 1.0}
    backwards = dict(reversed(list(ours.items())))
    assert paired_difference(ours, theirs) == paired_difference(backwards, theirs) == paired_difference(ours, theirs)


def test_other_questions_are_not_compared() -> None:
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None
    assert paired_difference({}, {}) is None
    assert mean_difference({"t": ({"a": 1.0}, {"a": 1.0, "b": 1.0})}) is None


def test_same_answers_have_no_difference() -> None:
    assert paired_difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}) == (0, 0, 0)


def test_comparison_shows_the_differences_from_the_first_run(tmp_path: Path) -> None:
    def good(stage: int, task: int, question: int) -> str:
        return reference(task, question)

    def worse(stage: int, task: int, question: int) -> str:
        return reference(task, question) if task == 1 or question % 2 else "no"

    runs = [
        write_answered_run(tmp_path / name, ["One", "Two"], 40, answer) for name, answer in (("a", good), ("b", worse))
    ]
    html = compare_runs(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    check_page(html)
    table = re.search(r'<table class="plain apart">.*?</table>', html)
    assert table
    cells = re.findall(r'<td class="(.*?)">(?:<b>)?(.*?)(?:</b>)?<small>(.*?)</small>', table.group())
    (one, two, mean) = cells
    assert one[:2] == ("down", "−50.0")
    assert two == ("", "0.0", "0.0 to 0.0")
    assert mean[:2] == ("down", "−25.0")
    low, high = resampled([100 * np.array([-1.0, 0.0] * 20)], 5000)
    ends = [float(end.replace("−", "-")) for end in one[2].split(" to ")]
    assert ends == [pytest.approx(low, abs=2.5), pytest.approx(high, abs=2.5)]
