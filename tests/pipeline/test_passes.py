"""How many samples the steps of a run send through the model, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from llava_cl.pipeline.data_checks import check_records
from llava_cl.pipeline.passes import count_passes
from runs import tiny_config


@pytest.mark.parametrize(
    ("method", "measured"),
    [("keeplora", {"measure", "remeasure"}), ("sequential", set()), ("splitlora", {"remeasure"})],
)
def test_passes_of_a_run(tmp_path: Path, method: str, measured: set[str]) -> None:
    content = tiny.run_content(tmp_path)
    config = tiny_config(tmp_path, {**content, "method": {"name": method}})
    records = {name: count for data in check_records(config) for name, count in data.records.items()}
    passes = count_passes(config, records)
    assert list(passes) == [0, 1, 2]
    for stage, task in ((1, "Colour"), (2, "Tone")):
        train = records[f"{task}/train.json"]
        assert train > 0
        assert passes[stage]["train"] == 3 * train * config.training.epochs
        assert {step for step in passes[stage] if "measure" in step} == measured
        for step in measured:
            assert passes[stage][step] == 3 * train * config.measurement.ratio
        for asked in ("Colour", "Tone"):
            assert passes[stage][f"evaluate {asked}"] == records[f"{asked}/test.json"]
    assert list(passes[0]) == ["protect", "evaluate Colour", "evaluate Tone"]
