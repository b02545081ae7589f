"""Sequential LoRA: train A and B on each task in turn, protect nothing. The baseline of everything."""

from __future__ import annotations

from torch import Generator, Tensor

from llava_cl.methods.contract import LayerStatistics, LoraFactors, Method, MethodOptions


class SequentialOptions(MethodOptions):
    """Options of sequential LoRA.

    Attributes:
        carry: train one adapter on through all tasks, as the LoRA-FT baseline of MCITlib; else each task starts a new
            one, after the last is merged.
    """

    carry: bool = False


class Sequential(Method):
    """Plain LoRA fine-tuning on one task after another (LoRA-FT).

    A is Kaiming-uniform and B zero (LoRA, ICLR 2022, section 4.1); both are trained.
    """

    train_a = True

    def __init__(self, options: SequentialOptions) -> None:
        self.before = frozenset({"adapter"} if options.carry else ())

    def initialise(
        self, shape: tuple[int, int], rank: int, statistics: LayerStatistics, basis: Tensor | None, generator: Generator
    ) -> LoraFactors:
        """Random A, zero B; or the last task's."""
        return statistics.adapter or super().initialise(shape, rank, statistics, basis, generator)
