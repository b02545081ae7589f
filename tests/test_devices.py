"""No tensor of the CPU meets one of the GPU, from measuring to answers; tried with a GPU that is pretended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.config import MethodConfig, ModelConfig
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.methods import LayerStatistics, LoraFactors, build_method
from llava_cl.models import family
from llava_cl.pipeline import stage as stages
from llava_cl.pipeline import steps
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.training.statistics import measure
from pretend_gpu import GPU, OnGpu, PretendGpu, on_gpu
from runs import result_hashes, run_here, tiny_config
from tiny import build_data, build_model, run_content
from tiny_samples import PAD_ID, build_samples

METHODS: dict[str, dict[str, Any]] = {
    "keeplora": {"name": "keeplora"},
    "keeplora, b": {"name": "keeplora", "options": {"b": "gradient", "protect": "feature"}},
    "keeplora, mean": {"name": "keeplora", "options": {"protect": "mean_feature", "weight_side": "output"}},
    "keeplora, random": {"name": "keeplora", "options": {"initialise": "random", "protect": None}},
    "splitlora": {"name": "splitlora"},
    "splitlora, gradient": {"name": "splitlora", "options": {"initialise": "gradient"}},
    "inflora": {"name": "inflora"},
    "inflora, inputs": {"name": "inflora", "options": {"spectrum": "inputs"}},
    "olora": {"name": "olora"},
    "sequential": {"name": "sequential", "options": {"carry": True}},
}
OUT = IN = 6


@pytest.fixture
def gpu() -> Iterator[None]:
    with PretendGpu():
        yield


def _on_gpu(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, torch.Tensor) else value


def _learned(method: dict[str, Any], put: Any) -> list[torch.Tensor]:
    """What a method makes of two tasks, with all that it is given on one device."""
    chosen = build_method(MethodConfig(**method))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made: list[torch.Tensor] = []
    last: LoraFactors | None = None
    basis = chosen.initial_basis(put(draw(OUT, IN)))
    for task in (1, 2):
        inputs = draw(IN, 9)
        moment = inputs @ inputs.T / 9
        known = {"gradient": draw(OUT, IN), "second_moment": moment, "mean_input": inputs}
        statistics = LayerStatistics(tasks=task - 1, **{key: put(value) for key, value in known.items()})
        if last is not None:
            adapter = LoraFactors(*(put(value) for value in last))
            statistics = dataclasses.replace(statistics, past_moment=put(moment), adapter=adapter)
        last = chosen.initialise((OUT, IN), 2, statistics, basis, torch.Generator().manual_seed(task))
        last = LoraFactors(*(factor.cpu() for factor in last))
        a = put(last.a.clone()).requires_grad_()
        made += [*last, chosen.penalty(a, basis)]
        adapter = LoraFactors(*(put(value) for value in last))
        basis = chosen.protect(
            dataclasses.replace(statistics, tasks=task, past_moment=put(moment), adapter=adapter), basis
        )
        made += [] if basis is None else [basis]
    return [value.detach().cpu() for value in made]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_gets_tensors_of_one_device_and_mixes_none(method: dict[str, Any], gpu: None) -> None:
    expected = _learned(method, lambda value: value)
    found = _learned(method, _on_gpu)
    assert len(found) == len(expected) >= 6
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize(("place", "device"), [("device", "meta"), ("host", "cpu"), (1e-5, "cpu")])
def test_means_leave_the_gpu_where_the_sums_of_all_passes_would_not_fit(
    tiny_run: Path, place: Any, device: str, gpu: None
) -> None:
    llava = family(ModelConfig(path=tiny_run / "model", dtype="float32", attention="eager"))
    model = on_gpu(llava.load(torch.device("cpu")))
    targets = llava.linear_targets(model)
    measured = measure(
        model,
        [collate_train(build_samples("it"), PAD_ID)],
        targets,
        wanted=frozenset({"gradient", "second_moment"}),
        owners=dict.fromkeys([*targets, *(target.source for target in targets.values())], 0),
        world=World(0, 1, GPU),
        entries=llava.entries(model),
        token_mask=llava.token_mask,
        place=place,
    )
    means = [*measured.gradients.values(), *measured.second_moments.values()]
    assert {mean.device.type for mean in means} == {device}


class _PretendedJob(Job):
    """A job whose model is put on the pretended GPU when it is read; it trains on the CPU."""

    def _read(self, *dtype: Any) -> Any:
        device, self.world = self.world, dataclasses.replace(self.world, device=torch.device("cpu"))
        try:
            model = super()._read(*dtype)
        finally:
            self.world = device
        return on_gpu(model)


@pytest.mark.parametrize("method", ["keeplora", "splitlora, gradient"])
def test_a_stage_on_a_gpu_gives_what_one_on_the_cpu_gives(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as the kernels are the same; all steps but training, which would need a Trainer of that device."""
    build_model(tmp_path / "model")
    build_data(tmp_path / "data", train=8, test=3)
    content = run_content(tmp_path, method=METHODS[method], measurement={"ratio": 0.5, "batch_size": 4, "sums": 1e-5})
    config = tiny_config(tmp_path, content, "model.attention=eager", "training.projector_learning_rate=null")
    run_here(config, tmp_path / "cpu")
    seen: list[str] = []

    def pretended(name: str, step: Any) -> Any:
        def run(job: Job, stage: int) -> Any:
            seen.append(name)
            on = dataclasses.replace(job.world, device=GPU)
            with PretendGpu():
                return step(_PretendedJob(config, job.run, on, ProgressWriter(None)), stage)

        return run

    # Tensors that pretend have no inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(steps, "protect_base", pretended("protect_base", steps.protect_base))
    for table, name in (
        (stages._LEARNING, "initialise"),
        (stages._LEARNING, "protect"),
        (stages._EVALUATION, "evaluate"),
    ):
        monkeypatch.setitem(table, name, pretended(name, table[name]))
    run_here(config, tmp_path / "gpu")
    assert set(seen) == {"protect_base", "initialise", "protect", "evaluate"}
    assert result_hashes(tmp_path / "gpu") == result_hashes(tmp_path / "cpu")
