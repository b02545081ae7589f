"""A stage does no more work, sends no more bytes, stores no more and loads no more often than the baseline says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("operation_counts")


@pytest.mark.distributed
@pytest.mark.e2e
def test_nothing_grew_against_the_baseline(counting: Any, tmp_path: Path) -> None:
    counts = counting.measure_counts(tmp_path / "counts")
    baseline = json.loads(counting.BASELINE.read_text())
    assert counting.grown(counts, baseline) == [], "if on purpose: python scripts/bench/operation_counts.py --update"
    # What the baseline has must still be counted.
    assert counts.keys() >= baseline.keys() - {"torch"}


def test_growth_of_more_than_a_twentieth_is_told(counting: Any) -> None:
    baseline = {"torch": torch.__version__.partition("+")[0], "loads": 100, "bytes": 100, "calls.train": 100}
    assert counting.grown({"loads": 105, "bytes": 50}, baseline) == []
    assert counting.grown({"loads": 106, "new": 1}, baseline) == [
        "loads: 106, the baseline has 100",
        "new: 1, the baseline has 0",
    ]
    assert counting.grown({"calls.train": 106}, baseline) == ["calls.train: 106, the baseline has 100"]
    assert counting.grown({"calls.train": 106}, {**baseline, "torch": "2.6.0"}) == []
