"""The examples of docs/extending.md work as they are printed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from llava_cl.data import QuestionRecord
from llava_cl.evaluation import scorers
from llava_cl.methods import contract
from llava_cl.subspace import expand_basis
from pretend_gpu import OnGpu, PretendGpu

BLOCKS = (Path(__file__).parents[2] / "docs" / "extending.md").read_text().split("```python\n")[1:]
SCORER, METHOD = (block.split("```")[0] for block in BLOCKS)


def test_the_scorer() -> None:
    names: dict[str, Any] = {**vars(scorers), "QuestionRecord": QuestionRecord, "SCORERS": {}}
    exec(SCORER, names)
    credit = names["SCORERS"]["first_word"].credit
    question = QuestionRecord("q", (), "What?", "red car")
    assert [credit(question, text) for text in ("red", "red bus", "a red car", "")] == [1, 1, 0, 0]


def test_the_method_stays_out_of_what_it_protects() -> None:
    names: dict[str, Any] = {**vars(contract), "expand_basis": expand_basis, "Field": Field}
    exec(METHOD, names)
    method = names["Quiet"](names["QuietOptions"](energy=0.9))
    assert method.after == {"second_moment"} and not method.train_a
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    basis = method.protect(contract.LayerStatistics(tasks=1, second_moment=inputs.T @ inputs / 200), None)
    assert 1 <= basis.shape[1] <= 3
    free, held = (method.initialise((5, 8), 2, contract.LayerStatistics(), b, generator) for b in (None, basis))
    assert free.a.shape == (2, 8) and held.b.shape == (5, 2) and not held.b.any()
    assert (held.a @ basis).abs().max() < 1e-5 < (free.a @ basis).abs().max()
    with PretendGpu():
        moment = OnGpu(inputs.T @ inputs / 200)
        there = method.protect(contract.LayerStatistics(tasks=1, second_moment=moment), None)
        method.initialise((5, 8), 2, contract.LayerStatistics(), there, generator)
