"""A stage's training: the same for every number of ranks and ZeRO stage, and resumable to the last bit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from training_job import Trained, TrainingJob, run_training
from transformers import TrainingArguments

from llava_cl.data import GlobalBatchSampler
from llava_cl.distributed import World
from llava_cl.models import family
from llava_cl.training.adapters import attach, collect
from ranks import RankFailed, run_ranks
from tiny_samples import SampleDataset, build_samples

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, int | None]] = {
    "ddp-2": (2, None),
    "zero1-2": (2, 1),
    "zero2-2": (2, 2),
    "zero3-2": (2, 3),
    "zero2-4": (4, 2),
}
TWO_EPOCHS: dict[str, Any] = {"gradient_b": True, "training": {"epochs": 2}}
"""3 steps an epoch, the third on 5 of 8 samples; B starts from other values than zero."""

Job = Callable[..., TrainingJob]
Undisturbed = Callable[[int, int | None], list[Trained]]


@pytest.fixture(scope="module")
def job(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with a scratch folder of its own."""

    def make(**changes: Any) -> TrainingJob:
        return TrainingJob(tiny_run, tmp_path_factory.mktemp("scratch"), **changes)

    return make


def _run(size: int, job: TrainingJob) -> list[Trained]:
    return run_ranks(run_training, size, job, use_deepspeed=job.zero is not None)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> Undisturbed:
    """Two epochs without a stop on so many ranks with this ZeRO stage; each is run once."""
    return functools.cache(lambda size, zero: _run(size, job(zero=zero, **TWO_EPOCHS)))


@pytest.fixture(scope="module")
def alone(undisturbed: Undisturbed) -> Trained:
    return undisturbed(1, None)[0]


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=list(LAYOUTS))
def shared_out(request: pytest.FixtureRequest, undisturbed: Undisturbed) -> list[Trained]:
    return undisturbed(*request.param)


def _relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


def _assert_equal(result: Trained, expected: Trained, *, bound: float = 0.0) -> None:
    """Log and tensors equal: relatively to `bound`, or bit for bit."""
    assert [row["step"] for row in result.rows] == [row["step"] for row in expected.rows]
    assert result.tensors.keys() == expected.tensors.keys()
    for row, other in zip(result.rows, expected.rows, strict=True):
        assert row["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-12)
        assert row["loss"] == pytest.approx(other["loss"], rel=bound, abs=0)
    for name, tensor in result.tensors.items():
        if bound:
            assert _relative_error(tensor, expected.tensors[name]) < bound, name
        else:
            assert torch.equal(tensor, expected.tensors[name]), name


def test_ranks_and_zero_stages_change_nothing(alone: Trained, shared_out: list[Trained]) -> None:
    for result in shared_out:
        _assert_equal(result, alone, bound=1e-5)
        assert [row["loss"] for row in result.rows] == pytest.approx([row["loss"] for row in alone.rows], rel=1e-6)


def test_all_ranks_collect_whole_tensors(shared_out: list[Trained]) -> None:
    first = shared_out[0]
    assert {name.rpartition(".lora_")[0] for name in first.tensors if ".lora_" in name} == {
        f"base_model.model.{layer}" for layer in first.factors
    }
    for layer, factors in first.factors.items():
        assert first.tensors[f"base_model.model.{layer}.lora_A.weight"].shape == factors.a.shape
        assert first.tensors[f"base_model.model.{layer}.lora_B.weight"].shape == factors.b.shape
    projector = "base_model.model.model.multi_modal_projector."
    assert {name: first.tensors[projector + name].shape for name in first.projector} == {
        name: value.shape for name, value in first.projector.items()
    }
    assert len(first.tensors) == 2 * len(first.factors) + len(first.projector)
    for other in shared_out[1:]:
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items())


def test_frozen_a_is_unchanged(shared_out: list[Trained]) -> None:
    for layer, factors in shared_out[0].factors.items():
        assert torch.equal(shared_out[0].tensors[f"base_model.model.{layer}.lora_A.weight"], factors.a)
        assert shared_out[0].tensors[f"base_model.model.{layer}.lora_B.weight"].any()


def test_a_model_loaded_afterwards_is_whole(shared_out: list[Trained]) -> None:
    assert all(result.whole_afterwards for result in shared_out)


def test_progress_is_reported_on_every_step(shared_out: list[Trained]) -> None:
    assert all(result.progress == [(step, 6) for step in range(7)] for result in shared_out)


@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": True}, {"micro_batch": 8}], ids=lambda change: next(iter(change))
)
def test_what_changes_speed_or_memory_alone_changes_nothing(job: Job, alone: Trained, change: dict[str, Any]) -> None:
    for result in _run(2, job(gradient_b=True, training={"epochs": 2, **change})):
        _assert_equal(result, alone, bound=1e-5)


def test_bfloat16_stays_close(job: Job, alone: Trained) -> None:
    """Under DeepSpeed adapters are bfloat16, with fp32 masters of what is trained; else they are fp32."""
    for size, zero in ((1, None), (2, 2)):
        result = _run(size, job(dtype="bfloat16", zero=zero, **TWO_EPOCHS))[0]
        assert [row["loss"] for row in result.rows] == pytest.approx([row["loss"] for row in alone.rows], rel=0.02)
        # In bfloat16 the rotary frequencies would put far tokens in wrong places.
        assert set(result.buffers.values()) == {torch.float32}, result.buffers
        assert any(name.endswith("rotary_emb.inv_freq") for name in result.buffers)
        assert not result.autocast, "adapters in fp32 would be multiplied in bfloat16"
        for layer, factors in result.factors.items():
            rounded = factors.a.bfloat16().float() if zero else factors.a
            assert torch.equal(result.tensors[f"base_model.model.{layer}.lora_A.weight"], rounded)
            trained = result.tensors[f"base_model.model.{layer}.lora_B.weight"]
            assert 0.5 < trained.norm() / alone.tensors[f"base_model.model.{layer}.lora_B.weight"].norm() < 2


def test_a_is_trained_where_the_method_asks(job: Job) -> None:
    result = _run(2, job(train_a=True, zero=2))[0]
    for layer, factors in result.factors.items():
        moved = result.tensors[f"base_model.model.{layer}.lora_A.weight"] - factors.a
        assert moved.abs().max() > 1e-4, layer


def test_first_step_moves_each_group_by_its_own_learning_rate(job: Job) -> None:
    """Adam's first step moves every entry by the learning rate, whatever its gradient."""
    rates = {"learning_rate": 3e-3, "projector_learning_rate": 7e-4, "scheduler": "constant"}
    result = _run(1, job(kinds="i" * 8, training=rates))[0]
    assert len(result.rows) == 1
    for layer in result.factors:
        moved = result.tensors[f"base_model.model.{layer}.lora_B.weight"]
        assert moved.abs().median().item() == pytest.approx(3e-3, rel=1e-3)
    for name, start in result.projector.items():
        moved = result.tensors[f"base_model.model.model.multi_modal_projector.{name}"] - start
        assert moved.abs().median().item() == pytest.approx(7e-4, rel=1e-2)


def test_training_is_adamw_on_the_mean_of_all_tokens(job: Job) -> None:
    """Losses, norms, rates and what is learned, against a loop over single samples that is written out here."""
    settings = {"epochs": 2, "weight_decay": 0.5, "max_grad_norm": 0.4, "warmup_ratio": 0.2, "micro_batch": 8}
    made = job(gradient_b=True, training=settings)
    result = _run(1, made)[0]
    config = made.config()
    llava = family(config.model)
    model = llava.load(torch.device("cpu"))
    connector = llava.projector_prefix()
    options: Any = {"train_a": False, "projector": connector, "fp32_adapters": True}
    adapted = attach(model, result.factors, config.lora, **options)
    samples = SampleDataset(build_samples(made.kinds))
    sampler = GlobalBatchSampler(_lengths(made), 8, 8, 0, 1, 7)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    steps, warmup = 6, 2  # a fifth of six is more than one
    for step, row in enumerate(result.rows):
        sampler.set_epoch(step // 3)
        batch = [{**samples[index]} for index in list(sampler)[step % 3]]
        losses, tokens = torch.zeros(()), 0
        for sample in batch:
            labels = torch.tensor(sample["labels"])[1:]
            inputs = {"input_ids": torch.tensor([sample["input_ids"]])}
            inputs |= {"pixel_values": sample["pixel_values"]} if "pixel_values" in sample else {}
            logits = model(**inputs).logits[0, :-1]
            losses = losses + functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            tokens += int((labels != -100).sum())
        for parameter in trained.values():
            parameter.grad = None
        (losses / tokens).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.values() if p.grad is not None))
        share = (step - warmup) / (steps - warmup)
        scale = step / warmup if step < warmup else (1 + math.cos(math.pi * share)) / 2
        assert norm > 0.4
        assert row["loss"] == pytest.approx(losses.item() / tokens, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["learning_rate"] == pytest.approx(scale * 5e-3, abs=1e-12)
        for name, parameter in trained.items():
            rate = scale * (2e-3 if "modules_to_save" in name else 5e-3)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * (0.4 / norm)
            first, second = moments[name]
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            change = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                parameter.mul_(1 - rate * 0.5).sub_(rate * change)
    for name, tensor in collect(adapted, result.factors, connector, train_a=False).items():
        assert _relative_error(result.tensors[name], tensor) < 1e-3, name


def test_a_frozen_projector_is_neither_trained_nor_collected(job: Job) -> None:
    result = _run(2, job(kinds="itttiiit", training={"projector_learning_rate": None}))[0]
    assert not any("projector" in name for name in result.tensors)
    assert len(result.tensors) == 2 * len(result.factors)


@pytest.mark.parametrize(
    ("size", "zero"), [(1, None), (2, None), (2, 2), (2, 3)], ids=["alone", "ddp", "zero2", "zero3"]
)
def test_resumed_training_is_the_undisturbed_one(
    job: Job, undisturbed: Undisturbed, size: int, zero: int | None
) -> None:
    killed = job(zero=zero, gradient_b=True, training={"epochs": 2, "checkpoint_every": 2}, die_at=5)
    with pytest.raises(RankFailed, match="died"):
        _run(size, killed)
    mark = json.loads((killed.scratch / "checkpoint-4" / "complete.json").read_text())
    assert mark["facts"] == {"ranks": size, "zero": zero or 0, "follows": ""}
    again = dataclasses.replace(killed, die_at=None)
    # The second time all steps are done, as after a kill before the adapter was stored.
    for steps in ([(4, 6), (5, 6), (6, 6)], [(6, 6)]):
        for result, expected in zip(_run(size, again), undisturbed(size, zero), strict=True):
            assert result.progress == steps
            _assert_equal(result, expected)
        live = [json.loads(line) for line in (killed.scratch / "log.jsonl").read_text().splitlines()]
        assert list({row["step"]: row for row in live}.values()) == result.rows


@pytest.mark.parametrize(("size", "zero"), [(1, None), (2, 2)], ids=["alone", "zero2"])
def test_resumed_training_draws_the_same_dropout(job: Job, alone: Trained, size: int, zero: int | None) -> None:
    undisturbed = job(zero=zero, gradient_b=True, training={"epochs": 2}, dropout=0.3)
    killed = job(zero=zero, gradient_b=True, training={"epochs": 2, "checkpoint_every": 2}, dropout=0.3, die_at=5)
    with pytest.raises(RankFailed, match="died"):
        _run(size, killed)
    resumed = _run(size, dataclasses.replace(killed, die_at=None))
    for result, expected in zip(resumed, _run(size, undisturbed), strict=True):
        assert result.progress == [(4, 6), (5, 6), (6, 6)]
        _assert_equal(result, expected)
        assert result.rows[0]["loss"] != pytest.approx(alone.rows[0]["loss"], rel=1e-4), "dropout was not on"


def test_a_half_written_resume_point_gives_way_to_the_one_before(job: Job, alone: Trained) -> None:
    killed = job(gradient_b=True, training={"epochs": 2, "checkpoint_every": 1}, die_at=5)
    with pytest.raises(RankFailed, match="died"):
        _run(1, killed)
    (killed.scratch / "checkpoint-4" / "complete.json").unlink()
    (killed.scratch / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    resumed = _run(1, dataclasses.replace(killed, die_at=None))[0]
    assert resumed.progress == [(3, 6), (4, 6), (5, 6), (6, 6)]
    _assert_equal(resumed, alone)


def test_another_number_of_ranks_starts_again(job: Job, alone: Trained) -> None:
    """A resume point holds the optimizer's shards and the random states of its own ranks."""
    killed = job(gradient_b=True, zero=2, training={"epochs": 2, "checkpoint_every": 2}, die_at=5)
    with pytest.raises(RankFailed, match="died"):
        _run(2, killed)
    restarted = _run(1, dataclasses.replace(killed, die_at=None))[0]
    assert restarted.progress[0] == (0, 6)
    _assert_equal(restarted, alone, bound=1e-5)
    marks = [json.loads(file.read_text())["facts"] for file in killed.scratch.glob("checkpoint-*/complete.json")]
    assert marks == [{"ranks": 1, "zero": 2, "follows": ""}] * len(marks)


def test_a_damaged_resume_point_gives_way_to_the_one_before(job: Job, alone: Trained) -> None:
    killed = job(gradient_b=True, training={"epochs": 2, "checkpoint_every": 1}, die_at=5)
    with pytest.raises(RankFailed, match="died"):
        _run(1, killed)
    file = killed.scratch / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resumed = _run(1, dataclasses.replace(killed, die_at=None))[0]
    assert resumed.progress == [(3, 6), (4, 6), (5, 6), (6, 6)]
    _assert_equal(resumed, alone)


ZERO: dict[str, int | None] = {"ddp": None, "zero1": 1, "zero2": 2, "zero3": 3}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("zero", ZERO.values(), ids=list(ZERO))
def test_a_signal_to_every_process_leaves_a_resume_point(
    job: Job, undisturbed: Undisturbed, zero: int | None, number: signal.Signals
) -> None:
    """Of adapters and optimizer alone. Other processes read the data, and go on."""
    training = {"epochs": 2, "workers": 2}
    how = {"start_method": "forkserver"} if number == signal.SIGHUP and zero == 3 else {}
    asked = job(zero=zero, stop_at=4, asked=int(number), gradient_b=True, training=training, **how)
    _assert_stopped(_run(2, asked), asked)
    if number == signal.SIGTERM:  # what was written does not depend on the signal
        _assert_goes_on(asked, 2, undisturbed(2, zero))


@pytest.mark.parametrize(("size", "zero"), [(1, None), (2, 1), (2, 3)], ids=["alone", "zero1", "zero3"])
@pytest.mark.parametrize("asked", ["file", "rank"])
def test_training_that_is_asked_to_stop_goes_on_from_that_step(
    job: Job, undisturbed: Undisturbed, size: int, zero: int | None, asked: Any
) -> None:
    """By the command, or with one rank alone asked; inside an epoch, without regular resume points."""
    training = {"epochs": 2, "workers": 1 if asked == "file" else 0}
    stopped = job(zero=zero, stop_at=2, asked=asked, gradient_b=True, training=training)
    _assert_stopped(_run(size, stopped), stopped)
    _assert_goes_on(stopped, size, undisturbed(size, zero))


def _assert_stopped(results: list[Trained], job: TrainingJob) -> None:
    for result in results:
        assert result.stopped
        assert result.progress[-1] == (job.stop_at, 6)
        assert not result.frozen_read
    (point,) = job.scratch.glob("checkpoint-*")
    assert point.name == f"checkpoint-{job.stop_at}" and (point / "complete.json").is_file()
    held: set[str] = set()
    for file in point.rglob("*model_states.pt"):
        states = torch.load(file, weights_only=False)
        assert not states["frozen_param_fragments"]
        held |= states["module"].keys()
    for file in point.glob("*.safetensors"):
        held |= load_file(file).keys()
    assert {name for name in held if ".lora_B." in name}
    trained = (".lora_A.", ".lora_B.", "multi_modal_projector.")
    buffers = {"base_model.model.model.vision_tower.embeddings.position_ids"}
    assert {name for name in held - buffers if not any(part in name for part in trained)} == set()
    assert not {name for name in held if ".original_module." in name}


def _assert_goes_on(stopped: TrainingJob, size: int, undisturbed: list[Trained]) -> None:
    assert stopped.stop_at is not None
    again = _run(size, dataclasses.replace(stopped, stop_at=None, asked="rank"))
    for result, expected in zip(again, undisturbed, strict=True):
        assert result.progress == [(number, 6) for number in range(stopped.stop_at, 7)]
        _assert_equal(result, expected)


def test_a_process_that_sees_several_gpus_trains_on_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in `nn.DataParallel` on all of them, whose gradients are sums over parts of each micro-batch."""

    real = inspect.getattr_static(TrainingArguments, "_setup_devices")

    def devices(arguments: TrainingArguments) -> torch.device:
        device: torch.device = (real.func if isinstance(real, functools.cached_property) else real.fget)(arguments)
        arguments._n_gpu = 2
        return device

    two = functools.cached_property(devices)
    two.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", two)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", None)
    assert len(run_training(World(0, 1, torch.device("cpu")), job(kinds="i" * 8)).rows) == 1


def test_a_request_in_the_last_step_comes_too_late_to_stop(job: Job, alone: Trained) -> None:
    result = _run(1, job(stop_at=6, **TWO_EPOCHS))[0]
    assert not result.stopped
    _assert_equal(result, alone)


@pytest.mark.parametrize("zero", [None, 2], ids=["ddp", "zero2"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(job: Job, zero: int | None) -> None:
    named = ", ".join(f"sample-{index}" for index in _global_batch(job(), 1))
    with pytest.raises(RankFailed, match=f"RunError: the training loss is nan at step 1, on the samples {named};"):
        _run(2, job(poison=True, zero=zero))


def test_a_training_that_explodes_stops_before_its_resume_point(job: Job) -> None:
    """The penalty grows with A without bound, where the model's own loss may saturate."""
    rates = {"epochs": 2, "learning_rate": 1e4, "checkpoint_every": 1, "scheduler": "constant"}
    wild = job(train_a=True, penalty=1.0, training=rates)
    grown = r"RunError: the training loss has grown from .* at step \d, on the samples sample-"
    with pytest.raises(RankFailed, match=grown) as error:
        _run(1, wild)
    found = re.search(r"at step (\d), on", str(error.value))
    assert found is not None
    kept = [int(mark.parent.name.rpartition("-")[2]) for mark in wild.scratch.glob("*/complete.json")]
    assert max(kept) == int(found[1]) - 1


def test_a_step_without_labels_stops_the_run_and_names_the_samples(job: Job) -> None:
    with pytest.raises(RankFailed, match=r"no sample of training step 1 has a label: (sample-[0-7](, )?){8}\."):
        _run(2, job(kinds="n" * 8))


def _lengths(job: TrainingJob) -> list[int]:
    return [len(s["input_ids"]) if "pixel_values" in s else -len(s["input_ids"]) for s in build_samples(job.kinds)]


def _global_batch(job: TrainingJob, step: int) -> list[int]:
    """The samples that both ranks together are given for an optimizer step, from what their samplers yield."""
    given: list[int] = []
    order = GlobalBatchSampler(_lengths(job), 8, 2, 0, 1, 7)
    for batch in list(order)[4 * (step - 1) : 4 * step]:
        given += batch
    return given
