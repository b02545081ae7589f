"""What a method is: the statistics it wants, how a layer's LoRA starts, and what it protects afterwards.

Every call is about one layer, so that layers can be shared out over the ranks. What a method is given is on the rank's
device; only generators are the CPU's, so that what is drawn is the same for every device, and has to be moved to meet
the rest. What it returns may be on any device. A new method is one file with one class and one options class, an entry
in `_methods`, and a YAML below configs/methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from llava_cl.config import MethodConfig, Section, checked
from llava_cl.errors import InputError
from llava_cl.parsing import near_miss, shown


class MethodOptions(Section):
    """Base of a method's options: unknown keys are errors, types are strict."""


class LoraFactors(NamedTuple):
    """Start of one layer's adapter; `scale * b @ a` is taken off the frozen weight, so it changes nothing.

    Attributes:
        a: `[rank, in]` fp32.
        b: `[out, rank]` fp32.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of one layer; None where the method did not ask for it, or there is none yet.

    Attributes:
        tasks: tasks learned so far; before the training of a stage without its own.
        stream: tasks of the whole stream.
        gradient: mean over the task's samples of dL/dW, `[out, in]` fp32.
        second_moment: mean over the task's tokens of x x^T of the layer's input, `[in, in]` fp32.
        past_moment: the same over the tokens of all tasks so far, each seen by the model that had just learned it.
        mean_input: sum over the task's batches of the layer's input, over the number of tokens,
            `[in, length * batch]` fp32: a column is a place in the batch.
        adapter: the factors of the last task as they were trained.
    """

    tasks: int = 0
    stream: int = 1
    gradient: Tensor | None = None
    second_moment: Tensor | None = None
    past_moment: Tensor | None = None
    mean_input: Tensor | None = None
    adapter: LoraFactors | None = None


class Method:
    """A continual-learning method; as it stands, A is random and frozen, B zero, nothing is protected or penalised."""

    train_a = False
    """Whether LoRA A is trained beside B."""
    before: frozenset[str] = frozenset()
    """Fields of `LayerStatistics` wanted before a stage's training, on the model as it is then."""
    after: frozenset[str] = frozenset()
    """Fields wanted after it, on the merged model."""
    penalises = False
    """Whether `penalty` is added to the loss."""

    def problem(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of `shape` (out, in) cannot be adapted, if it cannot."""
        return None

    def initial_basis(self, weight: Tensor) -> Tensor | None:
        """What of the base model's weight `[out, in]` is protected before the first task, `[in, k]`."""
        return None

    def initialise(
        self, shape: tuple[int, int], rank: int, statistics: LayerStatistics, basis: Tensor | None, generator: Generator
    ) -> LoraFactors:
        """The adapter of a layer of `shape` (out, in) before training; LoRA's own start (ICLR 2022, section 4.1)."""
        return LoraFactors(kaiming_a(shape, rank, generator), torch.zeros(shape[0], rank))

    def penalty(self, a: Tensor, basis: Tensor | None) -> Tensor:
        """What a layer adds to the loss of a step, for its factor A `[rank, in]` in training."""
        return a.new_zeros(())

    def protect(self, statistics: LayerStatistics, basis: Tensor | None) -> Tensor | None:
        """The basis after the stage; its first columns are the old ones, unchanged."""
        return basis


def kaiming_a(shape: tuple[int, int], rank: int, generator: Generator) -> Tensor:
    """LoRA's usual random A `[rank, in]`: Kaiming-uniform with a = sqrt(5), that is U(-1, 1) / sqrt(in)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator)


def square_root(second_moment: Tensor) -> Tensor:
    """F `[in, in]` with F F^T = the second moment, so that F's energy is the inputs' energy."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    return (vectors * values.clamp_min(0).sqrt()).float()


def _methods() -> dict[str, tuple[Any, type[MethodOptions]]]:
    from llava_cl.methods.inflora import InfLora, InfLoraOptions
    from llava_cl.methods.keeplora import KeepLora, KeepLoraOptions
    from llava_cl.methods.olora import OLora, OLoraOptions
    from llava_cl.methods.sequential import Sequential, SequentialOptions
    from llava_cl.methods.splitlora import SplitLora, SplitLoraOptions

    return {
        "inflora": (InfLora, InfLoraOptions),
        "keeplora": (KeepLora, KeepLoraOptions),
        "olora": (OLora, OLoraOptions),
        "sequential": (Sequential, SequentialOptions),
        "splitlora": (SplitLora, SplitLoraOptions),
    }


def known_methods() -> dict[str, str]:
    """Name -> first line of the description of every method."""
    return {name: (cls.__doc__ or name).strip().splitlines()[0] for name, (cls, _) in _methods().items()}


class Methods:
    """A run's method: one object for each part of a model that has options of its own, one for the rest.

    Attributes:
        train_a, penalises: as in `Method`, of any part.

    Raises:
        InputError: an unknown name or option.
    """

    def __init__(self, config: MethodConfig) -> None:
        self._by_part = {part: build_method(config, part) for part in ("", *config.parts)}
        self.train_a = any(method.train_a for method in self._by_part.values())
        self.penalises = any(method.penalises for method in self._by_part.values())

    def of(self, part: str) -> Method:
        """The method for a part of the model."""
        return self._by_part.get(part, self._by_part[""])

    def wanted(self, when: Literal["before", "after"]) -> frozenset[str]:
        """Fields of `LayerStatistics` wanted before or after a stage's training, for any part."""
        return frozenset().union(*(getattr(method, when) for method in self._by_part.values()))


def build_method(config: MethodConfig, part: str = "") -> Method:
    """The method that a configuration names, with validated options, for a part of the model.

    Raises:
        InputError: an unknown name or option.
    """
    methods = _methods()
    if config.name not in methods:
        known = f"{', '.join(sorted(methods))}.{near_miss(config.name, methods)}"
        raise InputError(f"method.name: unknown {shown(config.name)}; known: {known}")
    cls, options = methods[config.name]
    own = config.parts.get(part, {})

    def place(key: str) -> str:
        return f"method.{f'parts.{part}' if key in own else 'options'}.{key} of {config.name}"

    return cls(checked(options, {**config.options, **own}, place))
