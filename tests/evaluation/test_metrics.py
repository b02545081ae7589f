import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cl.errors import InputError
from llava_cl.evaluation.metrics import class_incremental, summarize

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics" / "metrics.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
KEYS = {"Last", "Average", "Transfer", "MFT", "MFN", "MAA", "BWT", "BWT_T", "Forgetting"}


def percent(case: dict[str, Any]) -> list[list[float]]:
    return [[100 * score for score in row] for row in case["matrix_fraction"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case['T']}")
def test_summary_agrees_with_the_reference(case: dict[str, Any]) -> None:
    mtil = case["mtil_unrounded_percent"]
    expected = {
        "Last": mtil["last_mean"],
        "Average": mtil["avg_mean"],
        "Transfer": mtil["transfer_mean"],
        "MFT": case["MFT"],
        "MFN": case["MFN"],
        "MAA": case["MAA"],
        "BWT": case["BWT_b_divisor_T_minus_1"],
        "BWT_T": case["BWT_a_divisor_T"],
        "Forgetting": case["forgetting_by_hand_percent_lower_triangle"][-1],
    }
    assert summarize(percent(case)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"T{case['T']}")
def test_class_incremental_agrees_with_the_reference(case: dict[str, Any]) -> None:
    found = class_incremental(percent(case), case["test_images_per_task"])
    assert found.accuracies == pytest.approx(case["class_incremental_percent"], abs=1e-9)
    assert found.last == pytest.approx(case["last_accuracy_percent"], abs=1e-9)
    assert found.average == pytest.approx(case["AAA_percent"], abs=1e-9)
    expected = [100 * value for value in case["splitlora_forgetting_per_stage_fraction"]]
    assert found.forgetting == pytest.approx(expected, abs=1e-9)


def test_three_tasks_by_hand() -> None:
    matrix = [[80, 10, 20], [90, 60, 40], [70, 50, 30]]
    assert summarize(matrix) == pytest.approx(
        {
            "Last": 50,  # (70 + 50 + 30) / 3
            "Average": 50,  # 450 / 9
            "Transfer": 20,  # ((10) + (20 + 40) / 2) / 2
            "MFT": 170 / 3,  # (80 + 60 + 30) / 3
            "MFN": 50,
            "MAA": (80 + 75 + 50) / 3,
            "BWT": -10,  # (70 - 80 + 50 - 60) / 2
            "BWT_T": -20 / 3,
            "Forgetting": 15,  # ((90 - 70) + (60 - 50)) / 2
        }
    )


def test_a_score_before_a_task_was_learned_is_not_forgotten() -> None:
    assert summarize([[80, 95], [80, 60]])["Forgetting"] == 0
    assert class_incremental([[80, 95, 0], [80, 60, 0], [80, 60, 0]], [1, 1, 1]).forgetting == [0, 0, 0]


def test_one_task() -> None:
    summary = summarize([[73.5]])
    assert summary == {
        **dict.fromkeys(("Last", "Average", "MFT", "MFN", "MAA"), 73.5),
        "Transfer": None,
        "BWT": None,
        "BWT_T": 0.0,
        "Forgetting": 0.0,
    }
    assert set(summarize([[None]]).values()) == {None}


def test_without_the_upper_triangle_only_its_numbers_are_missing() -> None:
    full = [[80.0, 10.0, 20.0], [90.0, 60.0, 40.0], [70.0, 50.0, 30.0]]
    lower = [[score if i <= t else None for i, score in enumerate(row)] for t, row in enumerate(full)]
    expected = summarize(full) | {"Average": None, "Transfer": None}
    assert summarize(lower) == expected
    assert class_incremental(lower, [1, 2, 3]) == class_incremental(full, [1, 2, 3])


@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(0, n - 1))))
def test_a_missing_entry_takes_away_exactly_what_needs_it(place: tuple[int, int, int]) -> None:
    size, stage, task = place
    matrix: list[list[float | None]] = [[50.0 + 3 * t - 2 * i for i in range(size)] for t in range(size)]
    full = summarize(matrix)
    matrix[stage][task] = None
    final, learned, before = stage == size - 1, stage == task, stage < task
    missing = {"Average"}
    missing |= {"Last", "MFN", "BWT_T"} if final else set()
    missing |= {"MFT", "BWT_T"} if learned else set()
    missing |= {"Transfer"} if before else {"MAA"}
    missing |= {"BWT"} if task < size - 1 and (final or learned) else set()
    missing |= {"Forgetting"} if task <= stage and (task < size - 1 or size == 1) else set()
    summary = summarize(matrix)
    assert set(summary) == KEYS
    assert {key for key in KEYS if summary[key] is None} - {key for key in KEYS if full[key] is None} == {
        key for key in missing if full[key] is not None
    }


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "it is empty"),
        ([[1.0, 2.0]], "row 1 has 2 entries, but there are 1 stages"),
        ([[1.0, 2.0], [1.0]], "row 2 has 1 entries"),
        ([[1.0, float("nan")], [1.0, 2.0]], "row 1, column 2 is nan"),
        ([["80"]], "row 1, column 1 is '80'"),
        ([[True]], "is True"),
    ],
)
def test_bad_matrices_are_refused(matrix: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        summarize(matrix)


def test_all_problems_are_listed_at_once() -> None:
    matrix: list[list[Any]] = [[float("inf"), 1.0, 3.0], ["x", 1.0, 2.0]]
    with pytest.raises(InputError) as caught:
        summarize(matrix)
    assert len(caught.value.problems) == 4


def test_class_incremental_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(InputError, match="2 positive numbers"):
        class_incremental([[1.0, 2.0], [1.0, 2.0]], [5])
    with pytest.raises(InputError, match=r"stages \[2\] lack"):
        class_incremental([[1.0, 2.0], [None, 2.0]], [5, 5])
