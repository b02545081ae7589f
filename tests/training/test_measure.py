"""`measure` on one process: what it refuses, and that it leaves the model as it was."""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from llava_cl.config import ModelConfig
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.errors import RunError
from llava_cl.models import LinearTarget, family
from llava_cl.subspace import Sketch
from llava_cl.training.statistics import Statistics, measure, save_memory, saves_memory, without_index
from tiny_samples import PAD_ID, build_samples

ALONE = World(0, 1, torch.device("cpu"))
BLOCK_0 = "model.language_model.layers.0"


@pytest.fixture
def model(tiny_run: Path) -> PreTrainedModel:
    return family(ModelConfig(path=tiny_run / "model", dtype="float32")).load(ALONE.device)


def _family(model: PreTrainedModel) -> Any:
    return family(ModelConfig(path=Path(str(model.config.name_or_path))))


def _targets(model: PreTrainedModel) -> dict[str, LinearTarget]:
    return _family(model).linear_targets(model)


def _measure(
    model: PreTrainedModel,
    samples: str | list[dict[str, Any]],
    *wanted: str,
    targets: dict[str, LinearTarget] | None = None,
    size: int | None = None,
    **options: Any,
) -> Statistics:
    targets = targets or _targets(model)
    owners = dict.fromkeys([*targets, *(target.source for target in targets.values())], 0)
    samples = build_samples(samples) if isinstance(samples, str) else samples
    size = size or len(samples)
    return measure(
        model,
        [collate_train(samples[start : start + size], PAD_ID) for start in range(0, len(samples), size)],
        targets,
        wanted=frozenset(wanted),
        owners=owners,
        world=ALONE,
        entries=[model.get_input_embeddings()],
        token_mask=_family(model).token_mask,
        **options,
    )


def test_only_what_is_wanted_is_measured(model: PreTrainedModel) -> None:
    gradient = _measure(model, "it", "gradient")
    moment = _measure(model, "it", "second_moment")
    assert gradient.gradients.keys() == _targets(model).keys()
    assert not gradient.second_moments
    assert not moment.gradients
    assert moment.second_moments.keys() == {target.source for target in _targets(model).values()}


def test_small_gradients_of_a_float16_model_are_no_zeros(model: PreTrainedModel) -> None:
    """Most are below what float16 tells from zero; the loss is scaled up, and the sums down again."""
    model.half()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0**-13)
    half = _measure(model, "iti", "gradient", "second_moment")
    full = _measure(model.float(), "iti", "gradient", "second_moment")
    for name, gradient in full.gradients.items():
        assert half.gradients[name].dtype == torch.float32
        assert (half.gradients[name] - gradient).norm() < 0.05 * gradient.norm()
    for name, moment in full.second_moments.items():
        assert (half.second_moments[name] - moment).norm() < 0.01 * moment.norm()


def test_a_padding_sample_adds_nothing(model: PreTrainedModel) -> None:
    samples = build_samples("iti")
    filler = {**samples[2], "index": -1, "labels": [-100] * len(samples[2]["labels"])}
    alone = _measure(model, samples[:2], "gradient", "second_moment")
    padded = _measure(model, [*samples[:2], filler], "gradient", "second_moment")
    assert (padded.samples, padded.skipped) == (alone.samples, alone.skipped) == (2, 0)
    for name, gradient in alone.gradients.items():
        torch.testing.assert_close(padded.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    for name, moment in alone.second_moments.items():
        torch.testing.assert_close(padded.second_moments[name], moment, rtol=1e-4, atol=1e-6)


def test_samples_without_labels_are_counted_apart(model: PreTrainedModel) -> None:
    statistics = _measure(model, "innt", "gradient")
    assert (statistics.samples, statistics.skipped) == (2, 2)


def test_no_label_at_all_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(RunError, match="no sample of the task has a supervised token"):
        _measure(model, "nn", "gradient")


@pytest.mark.parametrize("wanted", ["gradient", "second_moment"])
def test_a_layer_that_no_batch_reaches_is_named(model: PreTrainedModel, wanted: str) -> None:
    stray = {**_targets(model), "stray.linear": LinearTarget(nn.Linear(3, 2), "stray.linear")}
    with pytest.raises(RunError, match=r"no batch reached 1 targeted layers, first stray\.linear"):
        _measure(model, "it", wanted, targets=stray)


def test_a_gradient_that_is_not_finite_is_named(model: PreTrainedModel) -> None:
    def poison(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: grad * torch.nan)

    model.get_submodule(f"{BLOCK_0}.self_attn.o_proj").register_forward_hook(poison)
    with pytest.raises(RunError, match=rf"the gradient of {BLOCK_0}\.self_attn\.\w+_proj is not finite"):
        _measure(model, "it", "gradient")


def test_an_input_that_is_not_finite_is_named(model: PreTrainedModel) -> None:
    model.get_parameter(f"{BLOCK_0}.mlp.up_proj.weight")[0, 0] = torch.inf
    with pytest.raises(RunError, match=rf"the second_moment of {BLOCK_0}\.mlp_hidden is not finite"):
        _measure(model, "it", "second_moment")


def test_samples_whose_loss_is_not_finite_are_named(model: PreTrainedModel) -> None:
    samples = build_samples("iti")
    samples[2]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match=r"not finite in the batches of samples a, b, c\."):
        _measure(model, samples, "gradient", ids=["a", "b", "c"])


def test_a_gradient_that_is_zero_is_named(model: PreTrainedModel) -> None:
    model.get_parameter(f"{BLOCK_0}.self_attn.o_proj.weight").zero_()
    with pytest.raises(RunError, match=rf"the gradient of {BLOCK_0}\.self_attn\.[qkv]_proj is zero on all 2 samples"):
        _measure(model, "it", "gradient")


@pytest.mark.parametrize("kinds", ["it", "nn"], ids=["success", "failure"])
def test_the_model_is_left_as_it_was(model: PreTrainedModel, kinds: str) -> None:
    def state() -> Any:
        modules = [model.get_input_embeddings(), *(target.module for target in _targets(model).values())]
        hooks = [len(module._forward_hooks) for module in modules]
        return hooks, [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    before, weights = state(), [parameter.clone() for parameter in model.parameters()]
    try:
        _measure(model, kinds, "gradient", "second_moment")
    except RunError:
        assert kinds == "nn"
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))


EVERYTHING = ("gradient", "second_moment", "mean_input")


def _tensors(statistics: Statistics) -> dict[str, torch.Tensor]:
    return {f"{kind}:{name}": value for kind in EVERYTHING for name, value in statistics.of(kind).items()}


@pytest.mark.parametrize("place", ["host", 1e-5])
def test_where_sums_are_kept_does_not_change_a_bit(model: PreTrainedModel, place: Any) -> None:
    """1e-5 GB are two or three of the tiny model's sums."""
    runs = 0

    def count(_module: nn.Module, _inputs: Any) -> None:
        nonlocal runs
        runs += 1

    expected = _tensors(_measure(model, "itit", *EVERYTHING, size=2))
    model.register_forward_pre_hook(count)
    done: list[int] = []
    measured = _measure(model, "itit", *EVERYTHING, size=2, place=place, progress=done.append)
    assert (runs > 6) == (place != "host")
    assert done[-1] == 4 and done == sorted(done)
    assert (measured.samples, measured.skipped) == (4, 0)
    found = _tensors(measured)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("place", ["device", "host", 1e-5])
def test_a_sketch_is_that_of_the_gradient(model: PreTrainedModel, place: Any) -> None:
    exact = _measure(model, "itit", "gradient", size=2).gradients
    sketch = Sketch.draw(4, 40, 40, torch.Generator().manual_seed(0))
    measured = _measure(model, "itit", "gradient", size=2, place=place, sketch=sketch)
    assert not measured.gradients
    for name, gradient in exact.items():
        rows, features = gradient.shape
        of_range = gradient.double() @ sketch.omega[:features].double()
        of_rows = sketch.psi[:rows].double().T @ gradient.double()
        torch.testing.assert_close(measured.range_sketches[name].double(), of_range, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(measured.row_sketches[name].double(), of_rows, rtol=1e-4, atol=1e-6)
        rebuilt = measured.gradient(name)
        assert rebuilt is not None
        assert rebuilt.shape == gradient.shape
        assert torch.linalg.matrix_rank(rebuilt.double(), rtol=1e-6) <= 4


def test_a_sketch_that_saves_nothing_is_not_made(model: PreTrainedModel) -> None:
    sketch = Sketch.draw(12, 40, 40, torch.Generator().manual_seed(0))
    measured = _measure(model, "it", "gradient", sketch=sketch)
    assert measured.gradients.keys() == _targets(model).keys()
    assert not measured.range_sketches


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("too little memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cublas"],
)
def test_a_pass_that_runs_out_of_memory_begins_again_with_checkpointing(
    model: PreTrainedModel, error: Exception
) -> None:
    expected = _measure(model, "itit", *EVERYTHING, size=2)
    checkpointed: list[bool] = []

    def fill(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        checkpointed.append(saves_memory(model))
        if len(checkpointed) == 2:  # behind the first batch and most of the second
            raise error

    model.get_output_embeddings().register_forward_hook(fill)
    measured = _measure(model, "itit", *EVERYTHING, size=2)
    assert checkpointed == [False, False, True, True]
    assert (measured.samples, measured.tokens) == (expected.samples, expected.tokens)
    for key, value in _tensors(expected).items():
        torch.testing.assert_close(_tensors(measured)[key], value, rtol=1e-5, atol=1e-8)


def test_too_little_memory_for_checkpointing_is_an_error(model: PreTrainedModel) -> None:
    def fill(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise torch.OutOfMemoryError("too little memory")

    model.get_output_embeddings().register_forward_hook(fill)
    with pytest.raises(torch.OutOfMemoryError):
        _measure(model, "it", "gradient")
    assert not any(target.module._forward_hooks for target in _targets(model).values())


def test_another_error_is_no_lack_of_memory(model: PreTrainedModel) -> None:
    def fail(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _measure(model, "it", "gradient")
    assert not saves_memory(model)


def test_what_saves_memory_drops_nothing_out(tiny_run: Path) -> None:
    """Half of all attention would be dropped in a model that trains; a model that is measured does not."""
    llava = family(ModelConfig(path=tiny_run / "model", dtype="float32"))
    for tower in ("text_config", "vision_config"):
        getattr(llava._architecture, tower).attention_dropout = 0.5
    expected = _tensors(_measure(llava.load(ALONE.device), "itit", *EVERYTHING, size=2))
    again = llava.load(ALONE.device)
    assert again.model.language_model.layers[0].self_attn.attention_dropout == 0.5
    save_memory(again)
    computed = 0

    def count(_module: nn.Module, _inputs: Any) -> None:
        nonlocal computed
        computed += 1

    again.get_submodule(f"{BLOCK_0}.mlp").register_forward_pre_hook(count)
    found = _tensors(_measure(again, "itit", *EVERYTHING, size=2))
    assert computed == 4, "each of two batches goes through the block once more in backward"
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8)


class _Waits(TorchDispatchMode):
    """Where this package asks a tensor for its value, for which a GPU would have to finish its work."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            between = ("_python_dispatch.py", "_compile.py", "eval_frame.py")
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith(between)]
            if "/llava_cl/" in frames[-1].filename:
                self.places.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")
        return func(*args, **(kwargs or {}))


def test_measuring_a_batch_waits_for_nothing(model: PreTrainedModel) -> None:
    """But for what is asked of the batch, which is on the CPU, and of each sum and all losses in the end."""
    with _Waits() as few:
        _measure(model, "itit", *EVERYTHING, size=4)
    with _Waits() as many:
        _measure(model, "itit" * 3, *EVERYTHING, size=4)
    added = collections.Counter(many.places) - collections.Counter(few.places)
    asked = ("supervised & real", "real.all()")
    assert all(any(part in place for part in asked) for place in added), added


@pytest.mark.parametrize("items", [torch.tensor(7), 7, None])
def test_a_micro_batch_waits_for_nothing(model: PreTrainedModel, items: Any) -> None:
    batch = without_index(collate_train(build_samples("it"), PAD_ID))
    with _Waits() as waits:
        model(**batch, num_items_in_batch=items)["loss"]
    assert not waits.places


def test_progress_counts_samples(model: PreTrainedModel) -> None:
    done: list[int] = []
    report: Callable[[int], None] = done.append
    _measure(model, "itn", "second_moment", progress=report)
    assert done == [3]
