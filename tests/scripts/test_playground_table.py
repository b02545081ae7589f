"""The README's tables: which runs are in them, and what stands where."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_cl.config import RunConfig, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    return importlib.import_module("playground_table")


def test_the_readmes_own_command_gives_a_run_of_the_table(bench: Any) -> None:
    assert RunConfig.model_fields["seed"].default == bench.SEEDS[0]
    for stream, grids in bench.GRIDS.items():
        for method, rates in grids.items():
            name = bench.CONFIGS.get(method, method)
            config = load_config(ROOT / "configs" / "runs" / f"playground_{stream}_{name}.yaml")
            assert config.seed in bench.SEEDS
            if rates and method not in bench.CONFIGS:
                assert config.training.learning_rate in rates


def test_keeplora_is_tried_at_every_rate_of_plain_lora(bench: Any) -> None:
    for stream in ("ucit", "dcl"):
        assert set(bench.GRIDS[stream]["sequential"]) <= set(bench.GRIDS[stream]["keeplora"])
        assert {2e-4, 5e-4} <= set(bench.GRIDS[stream]["keeplora"])


def test_every_method_also_runs_at_the_rates_of_plain_lora_and_keeplora(bench: Any) -> None:
    chosen = {("ucit", "sequential"): 5e-4, ("ucit", "keeplora"): 2e-3, ("ucit", "keeplora_paper"): 5e-3}
    chosen |= {("cil", "inflora"): 1e-3, ("mtil", "zero_shot"): 1e-3}
    jobs = bench.final_jobs(chosen, (42, 1))
    assert len(jobs) == len(set(jobs))
    runs = {(job.stream, job.method, job.learning_rate): [] for job in jobs}
    for job in jobs:
        assert job.split == "test"
        runs[job.stream, job.method, job.learning_rate].append(job.seed)
    of_ucit = {
        ("ucit", method, rate) for method in ("sequential", "keeplora", "keeplora_paper") for rate in (5e-4, 2e-3)
    }
    assert runs.keys() == of_ucit | {
        ("ucit", "keeplora_paper", 5e-3),
        ("cil", "inflora", 1e-3),
        ("mtil", "zero_shot", 1e-3),
    }
    assert runs.pop(("mtil", "zero_shot", 1e-3)) == [42]
    assert all(seeds == [42, 1] for seeds in runs.values())


def test_the_tables_say_at_which_rate(bench: Any) -> None:
    chosen = {("dcl", "sequential"): 5e-4, ("dcl", "keeplora"): 2e-3}
    values = {
        job: dict.fromkeys(bench.METRICS["dcl"], 1e4 * job.learning_rate + job.seed)
        for job in bench.final_jobs(chosen, (1, 3))
    }
    text = bench.tables(chosen, values)
    own, equal = text.split("\n\n")
    assert own.splitlines()[2:] == [
        "| sequential | 0.0005 |" + " 7.0 ± 1.4 |" * 5,
        "| keeplora | 0.002 |" + " 22.0 ± 1.4 |" * 5,
    ]
    assert equal.startswith("| dcl, equal rates | learning rate | MFT |")
    assert [line.split(" | ")[:2] for line in equal.splitlines()[2:]] == [
        ["| sequential", "0.0005"],
        ["| keeplora", "0.0005"],
        ["| sequential", "0.002"],
        ["| keeplora", "0.002"],
    ]


def test_rates_are_chosen_on_validation_and_all_tables_are_written(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of invented runs, plain LoRA's best at 1e-3 and KeepLoRA's at 2e-4."""
    best = {"sequential": 1e-3, "keeplora": 2e-4}

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def map(self, function: Any, *lists: Any) -> Any:
            return map(function, *lists)

    def run(job: Any, output: Path) -> dict[str, float]:
        assert output == tmp_path
        good = 90.0 - 1e4 * abs(job.learning_rate - best[job.method])
        return dict.fromkeys(bench.METRICS["ucit"], good)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "run", run)
    arguments = ["--output", str(tmp_path), "--streams", "ucit", "--methods", *best, "--seeds", "42"]
    monkeypatch.setattr(sys, "argv", ["playground_table.py", *arguments])
    bench.main()
    own, equal = (tmp_path / "table.md").read_text().split("\n\n")
    assert [line.split(" | ")[:3] for line in own.splitlines()[2:]] == [
        ["| sequential", "0.001", "90.0"],
        ["| keeplora", "0.0002", "90.0"],
    ]
    assert len(equal.splitlines()) == 2 + 4
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["split"] for row in rows} == {"validation", "test"}
    assert {row["seed"] for row in rows if row["split"] == "test"} == {42}
