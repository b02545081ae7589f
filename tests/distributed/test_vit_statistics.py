"""Statistics of a ViT against one-process autograd in float64, and running moments against plain averages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import ViTModel

from llava_cl.config import ClassTaskConfig, ModelConfig
from llava_cl.distributed import World, share_out
from llava_cl.models import family
from llava_cl.pipeline.bases import load_moments, update_moments
from llava_cl.store import RunDirectory
from llava_cl.training.statistics import Statistics, measure
from ranks import run_ranks
from tiny_vit import build_model

pytestmark = pytest.mark.distributed

ALL = frozenset({"gradient", "second_moment", "mean_input"})
TASKS = tuple(
    ClassTaskConfig(name=name, train="train", test="test", classes=classes)
    for name, classes in (("A", ("a", "b")), ("B", ("c", "d", "e")))
)
TASK, TEMPERATURE = 1, 1.7
COUNT, BATCH, TOKENS = 11, 3, 5
"""Samples, samples in a batch, tokens in an image. The last batch is short."""
ALONE = World(0, 1, torch.device("cpu"))
GOLDEN = Path(__file__).parents[1] / "golden" / "subspace" / "splitlora_stream.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("vit"))


def _samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(COUNT, 3, 16, 16, generator=generator), torch.randint(0, 3, (COUNT,), generator=generator)


def _head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(3, 24, generator=generator), torch.randn(3, generator=generator)


def _batch(indices: list[int]) -> dict[str, torch.Tensor]:
    """A batch of samples; -1 is the first picture without a label."""
    pixels, labels = _samples()
    return {
        "pixel_values": pixels[[max(index, 0) for index in indices]],
        "labels": torch.tensor([-100 if index < 0 else int(labels[index]) for index in indices]),
        "index": torch.tensor(indices),
    }


def _batches(count: int = COUNT) -> list[list[int]]:
    return [list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]


def _measure(world: World, folder: Path, batches: list[list[int]]) -> Statistics:
    """Measures over this rank's share of the batches."""
    vit: Any = family(ModelConfig(family="vit", path=folder, dtype="float32"))
    model = vit.load(world.device)
    vit.install(model, TASKS)
    vit.learn(model, TASK, TEMPERATURE)
    with torch.no_grad():
        model.heads[TASK].weight.copy_(_head()[0])
        model.heads[TASK].bias.copy_(_head()[1])
    targets = vit.linear_targets(model)
    names = [*targets, *sorted({target.source for target in targets.values()})]
    return measure(
        model,
        (_batch(batch) for batch in batches[world.rank :: world.size]),
        targets,
        wanted=ALL,
        owners=share_out({name: float(len(name)) for name in names}, world.size),
        world=world,
        entries=vit.entries(model),
        token_mask=vit.token_mask,
    )


def _merged(parts: list[Statistics]) -> Statistics:
    """What all owners hold together; each tensor must have one owner only."""
    merged = Statistics(samples=parts[0].samples, skipped=parts[0].skipped, tokens=parts[0].tokens)
    for kind in ("gradients", "second_moments", "mean_inputs"):
        for part in parts:
            assert not getattr(merged, kind).keys() & getattr(part, kind).keys()
            getattr(merged, kind).update(getattr(part, kind))
    assert all(part.tokens == merged.tokens for part in parts)
    return merged


def _measured(folder: Path, batches: list[list[int]], size: int) -> Statistics:
    if size == 1:
        return _measure(ALONE, folder, batches)
    return _merged(run_ranks(_measure, size, folder, batches))


@dataclasses.dataclass
class Reference:
    """By autograd on the base weights over all samples at once, in float64."""

    gradients: dict[str, torch.Tensor]
    """Block and projection -> mean gradient."""
    inputs: list[torch.Tensor]
    """Of each block's keys and values, `[images, tokens, width]`."""


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float64, attn_implementation="eager")
    model.eval().requires_grad_(False)
    weights: dict[str, nn.Parameter] = {}
    inputs: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight", "key.weight", "value.weight")):
            weights[name.removesuffix(".weight")] = parameter.requires_grad_(True)

    def keep(name: str) -> Any:
        return lambda _module, arguments: inputs.update({name: arguments[0].detach()})

    for name in weights:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    pixels, labels = _samples()
    weight, bias = _head()
    logits = nn.functional.linear(
        model(pixel_values=pixels.double()).last_hidden_state[:, 0], weight.double(), bias.double()
    )
    nn.functional.cross_entropy(logits / TEMPERATURE, labels).backward()
    gradients = {f"vit.{name}": parameter.grad for name, parameter in weights.items() if parameter.grad is not None}
    keys, values = list(inputs.values())[::2], list(inputs.values())[1::2]
    assert len(gradients) == 4
    assert all(map(torch.equal, keys, values))
    return Reference(gradients, keys)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.dtype == torch.float32
    assert value.shape == expected.shape
    return float((value.double() - expected).norm() / expected.norm())


def _check_moments(statistics: Statistics, reference: Reference, count: int) -> None:
    """The mean of x x^T over all tokens of the first `count` images."""
    assert len(statistics.second_moments) == 2
    for block, moment in enumerate(dict(sorted(statistics.second_moments.items())).values()):
        tokens = reference.inputs[block][:count].flatten(0, 1)
        assert _error(moment, tokens.T @ tokens / len(tokens)) < 1e-6
    assert set(statistics.tokens.values()) == {count * TOKENS}
    assert statistics.tokens.keys() == statistics.second_moments.keys()


def _check_mean_inputs(statistics: Statistics, reference: Reference, full: int) -> None:
    """The sum over the first `full` batches over their number of tokens; a column is a place in the batch."""
    assert len(statistics.mean_inputs) == 2
    for block, mean in enumerate(dict(sorted(statistics.mean_inputs.items())).values()):
        batches = reference.inputs[block][: full * BATCH].reshape(full, BATCH * TOKENS, -1)
        assert _error(mean, batches.sum(dim=0).T / (full * BATCH * TOKENS)) < 1e-6


@pytest.mark.parametrize("size", [1, 2])
def test_equals_autograd_and_plain_means(folder: Path, reference: Reference, size: int) -> None:
    statistics = _measured(folder, _batches(), size)
    assert (statistics.samples, statistics.skipped) == (COUNT, 0)
    assert statistics.gradients.keys() == reference.gradients.keys()
    for name, gradient in statistics.gradients.items():
        assert _error(gradient, reference.gradients[name]) < 1e-6, name
    _check_moments(statistics, reference, COUNT)
    _check_mean_inputs(statistics, reference, COUNT // BATCH)


@pytest.mark.parametrize(
    ("count", "size"), [(5, 2), (3, 2), (8, 3)], ids=["only a short batch", "no batch", "a short batch first"]
)
def test_a_rank_without_a_full_batch_adds_no_mean_input(
    folder: Path, reference: Reference, count: int, size: int
) -> None:
    """Of 5 samples the second rank has the two of the short batch, and of 3 it has none."""
    statistics = _measured(folder, _batches(count), size)
    assert statistics.samples == count
    _check_moments(statistics, reference, count)
    _check_mean_inputs(statistics, reference, count // BATCH)


def test_samples_that_fill_up_a_batch_add_nothing(folder: Path) -> None:
    """In a batch with others, and in one of its own."""
    plain = _measured(folder, [[0, 1, 2], [3, 4, 5], [6]], 1)
    filled = _measured(folder, [[0, 1, 2], [3, 4, 5], [6, -1], [-1, -1, -1]], 1)
    assert (filled.samples, filled.skipped) == (7, 0)
    assert filled.tokens == plain.tokens
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(filled.gradients[name], gradient, rtol=1e-5, atol=1e-8)
    for name, moment in plain.second_moments.items():
        torch.testing.assert_close(filled.second_moments[name], moment, rtol=1e-5, atol=1e-7)
    for name, mean in plain.mean_inputs.items():
        torch.testing.assert_close(filled.mean_inputs[name], mean, rtol=1e-5, atol=1e-7)


def test_the_loss_is_that_of_the_task(folder: Path, reference: Reference) -> None:
    """Another task's head, or another temperature, would give other gradients."""
    vit: Any = family(ModelConfig(family="vit", path=folder, dtype="float32"))
    model = vit.load(ALONE.device)
    vit.install(model, TASKS)
    vit.learn(model, 0, 2.0)
    pixels, _ = _samples()
    labels = torch.tensor([0, 1] * 5 + [-100])
    weight, bias = _head()
    with torch.no_grad():
        model.heads[0].weight.copy_(weight[:2])
        model.heads[0].bias.copy_(bias[:2])
        features = model.features(pixels)
        loss = model(pixel_values=pixels, labels=labels)["loss"]
        halved = model(pixel_values=pixels, labels=labels, num_items_in_batch=20)["loss"]
    expected = nn.functional.cross_entropy((features @ weight[:2].T + bias[:2])[:10] / 2, labels[:10])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(halved, expected / 2, rtol=1e-5, atol=0)


def _stream() -> list[dict[str, torch.Tensor]]:
    """Inputs of three tasks by name, of different numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    return [
        {name: scale * torch.randn(rows, 6, generator=generator) for name in ("x", "y", "z")}
        for scale, rows in ((1.0, 7), (3.0, 40), (0.5, 19))
    ]


def _run_moments(world: World, place: Path) -> list[dict[str, torch.Tensor]]:
    """The running moments that this rank is given after each stage."""
    run = RunDirectory(place, ["A", "B", "C"])
    job: Any = SimpleNamespace(run=run, world=world, stage=run.stage)
    owners = {name: number % world.size for number, name in enumerate(("x", "y", "z"))}
    returned = []
    for stage, inputs in enumerate(_stream(), start=1):
        tokens = {name: len(rows) for name, rows in inputs.items()}
        mine = {name: r.T @ r / len(r) for name, r in inputs.items() if owners[name] == world.rank}
        returned.append(update_moments(job, stage, mine, tokens, owners))
        if world.size > 1:
            torch.distributed.barrier()
    return returned


@pytest.mark.parametrize("size", [1, 2])
def test_running_moments_are_the_plain_average_over_all_tokens(tmp_path: Path, size: int) -> None:
    returned = [_run_moments(ALONE, tmp_path)] if size == 1 else run_ranks(_run_moments, size, tmp_path)
    run = RunDirectory(tmp_path, ["A", "B", "C"])
    for stage in (1, 2, 3):
        moments, tokens = load_moments(run, stage, ["x", "y", "z"])
        of_ranks = [moment for part in returned for moment in part[stage - 1].items()]
        assert sorted(name for name, _ in of_ranks) == ["x", "y", "z"]
        for name, moment in of_ranks:
            assert torch.equal(moment, moments[name])
            seen = torch.cat([task[name] for task in _stream()[:stage]]).double()
            assert _error(moments[name], seen.T @ seen / len(seen)) < 1e-6
            assert tokens[name] == len(seen)


def _received_of_moments(world: World, place: Path) -> int:
    """Bytes of tensors that this rank is sent while the running moments are written."""
    received = 0
    real = {name: getattr(dist, name) for name in ("recv", "broadcast")}

    def spy(name: str) -> Any:
        def count(tensor: torch.Tensor, src: int) -> Any:
            nonlocal received
            received += tensor.nbytes if src != world.rank else 0
            return real[name](tensor, src=src)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(dist, name, spy(name))
        _run_moments(world, place)
    return received


def test_running_moments_go_to_the_rank_that_writes_them_alone(tmp_path: Path) -> None:
    """Of three 6 x 6 moments rank 1 owns one, which it sends after each of three stages; the files are one rank's."""
    _run_moments(ALONE, tmp_path / "one")
    assert run_ranks(_received_of_moments, 2, tmp_path / "two") == [3 * 6 * 6 * 4, 0]
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_running_moments_are_the_references(tmp_path: Path) -> None:
    """The reference adds one batch after the other and never starts again."""
    run = RunDirectory(tmp_path, ["0", "1", "2", "3"])
    job: Any = SimpleNamespace(run=run, world=ALONE, stage=run.stage)
    with np.load(GOLDEN) as golden:
        for stage, steps in enumerate(((0, 1), (2, 3, 4), (5, 6), (7, 8, 9)), start=1):
            x = torch.cat([torch.from_numpy(golden[f"cov/x{step}"]).flatten(0, 1) for step in steps])
            running = update_moments(job, stage, {"x": x.T @ x / len(x)}, {"x": len(x)}, {"x": 0})
            assert _error(running["x"], torch.from_numpy(golden[f"cov/C{steps[-1]}"]).double()) < 1e-6
