"""The model that stays with a job: its weights are those of a fresh load, whatever was done with it before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from llava_cl.config import load_config
from llava_cl.distributed import World
from llava_cl.pipeline import steps
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory, read_json
from ranks import run_ranks
from runs import run_here, tiny_config

ALONE = World(0, 1, torch.device("cpu"))
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    content = tiny.run_content(folder)
    overrides = [f"model.dtype={request.param}"]
    if request.param == "bfloat16":
        overrides.append("training.projector_learning_rate=null")  # it needs DeepSpeed's fp32 copy
    seeds: list[int] = []

    def train(*arguments: Any, **options: Any) -> Any:
        seeds.append(arguments[5].seed)
        return real(*arguments, **options)

    real = steps.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "train", train)
        run_here(tiny_config(folder, content, *overrides), folder / "run")
    (folder / "seeds.json").write_text(json.dumps(seeds))
    return folder


def _job(folder: Path, world: World, *overrides: str) -> Job:
    run = folder / "run"
    config = load_config(folder / "run.yaml", overrides)  # read alone, as several ranks do so at once
    return Job(config, RunDirectory(run, [task.name for task in config.benchmark.tasks]), world, ProgressWriter(None))


def _dtype(folder: Path) -> str:
    return f"model.dtype={read_json(folder / 'run' / 'run.json')['config']['model']['dtype']}"


def _zero(stage: int) -> str:
    return f"distributed.deepspeed={Path(__file__).parents[2] / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


def _values(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _same(model: Any, other: dict[str, torch.Tensor]) -> None:
    own = _values(model)
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def _spoil(model: Any) -> None:
    """What a training does: wrap modules, write to adapted weights and to what is trained beside them, set modes."""
    model.get_parameter(f"{Q_PROJ}.weight").data.add_(1.0)
    adapted = get_peft_model(model, LoraConfig(target_modules=[Q_PROJ], modules_to_save=["multi_modal_projector"]))
    adapted.train()
    model.config.text_config.use_cache = False
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(3.0)
    model.get_input_embeddings().register_forward_hook(lambda *_: None)


def test_from_stage_to_stage_it_is_as_loaded(run: Path) -> None:
    fresh = {stages: _values(_job(run, ALONE, _dtype(run)).load_model(stages)) for stages in (0, 1, 2)}
    job = _job(run, ALONE, _dtype(run))
    _same(job.model_after(0, to_learn=True), fresh[0])
    _spoil(job.model_to_train(0))
    after = job.model_after(1, to_learn=True)
    _same(after, fresh[1])
    assert not after.training
    assert after.config.text_config.use_cache
    assert not after.get_input_embeddings()._forward_hooks
    assert not any(parameter.requires_grad for parameter in after.parameters())
    _spoil(job.model_to_train(1))
    _same(job.model_after(2), fresh[2])
    _same(job.model_after(2), fresh[2])
    assert job.loads == 1


def test_each_stage_is_trained_with_a_seed_of_its_own(run: Path) -> None:
    digests = [hashlib.sha256(f"42/{stage}/train".encode()).digest()[:4] for stage in (1, 2)]
    expected = [int.from_bytes(digest, "little") // 2 for digest in digests]
    assert json.loads((run / "seeds.json").read_text()) == expected


def test_back_to_the_base_it_is_read_again(run: Path) -> None:
    fresh = {stages: _values(_job(run, ALONE, _dtype(run)).load_model(stages)) for stages in (0, 1)}
    for overrides in ((), (_zero(3),)):
        job = _job(run, ALONE, _dtype(run), *overrides)
        _same(job.model_after(1), fresh[1])  # keeps nothing, so that what trains is read again
        _spoil(job.model_to_train(1))
        _same(job.model_after(0, to_learn=True), fresh[0])
        _spoil(job.model_to_train(0))
        _same(job.model_after(1), fresh[1])
        assert job.loads == 3


def test_without_the_weights_of_the_base_it_is_loaded_again(run: Path) -> None:
    fresh = {stages: _values(_job(run, ALONE, _dtype(run)).load_model(stages)) for stages in (1, 2)}
    job = _job(run, ALONE, _dtype(run))
    _same(job.model_after(2), fresh[2])
    _same(job.model_after(1, to_learn=True), fresh[1])
    assert job.loads == 2


def _stages_of_a_rank(world: World, folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], set[str], int]:
    job = _job(folder, world, *overrides)
    _spoil(job.model_to_train(1))
    assert job._base is not None
    kept = set(job._base)
    return _values(job.model_after(2)), kept, job.loads


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_share_the_weights_of_the_base(run: Path, zero: int) -> None:
    """With ZeRO-3, which takes the model apart, all of them."""
    model = _job(run, ALONE, _dtype(run)).load_model(2)
    fresh = _values(model)
    results = run_ranks(_stages_of_a_rank, 2, run, _dtype(run), _zero(zero))
    for values, _, loads in results:
        assert values.keys() == fresh.keys()
        assert all(torch.equal(value, fresh[name]) for name, value in values.items())
        assert loads == 1
    first, second = (kept for _, kept, _ in results)
    assert first and second and not first & second
    assert len(first | second) == (14 if zero == 2 else len(list(model.named_parameters())))


def test_zero_3_gets_the_model_and_the_next_is_put_together_again(run: Path) -> None:
    job = _job(run, ALONE, _dtype(run), _zero(3))
    fresh = {stages: _values(_job(run, ALONE, _dtype(run)).load_model(stages)) for stages in (1, 2)}
    _same(job.model_after(1, to_learn=True), fresh[1])
    given = job.model_to_train(1)
    _same(given, fresh[1])
    _spoil(given)
    for parameter in given.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)  # as the engine does
    after = job.model_after(2)
    _same(after, fresh[2])
    assert not any(parameter.requires_grad for parameter in after.parameters())
    assert not after.get_input_embeddings()._forward_hooks
    assert job.loads == 1
