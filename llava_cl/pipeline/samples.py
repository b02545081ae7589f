"""How the tasks of a run become samples and answers: the contract, and the choice by kind of task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from llava_cl.config import AnyTask, ClassTaskConfig, RunConfig
from llava_cl.data import QuestionRecord
from llava_cl.distributed import World
from llava_cl.errors import InputError
from llava_cl.models import LinearTarget, ModelFamily
from llava_cl.models.reading import reading
from llava_cl.parsing import near_miss


def _no_epochs(epoch: int) -> None:
    """For samples that are the same in every epoch."""


class TrainingData(NamedTuple):
    """A task's training samples.

    Attributes:
        dataset: samples by index; -1 is one without labels that only fills up a batch.
        lengths: length of each sample (see `llava_cl.data.GlobalBatchSampler`).
        ids: the samples' ids, to name them.
        set_epoch: tells the samples the epoch that begins.
    """

    dataset: Dataset[dict[str, Any]]
    lengths: list[int]
    ids: Sequence[int | str]
    set_epoch: Callable[[int], None] = _no_epochs


class TrainedModule(NamedTuple):
    """A module that is trained whole beside the adapters: its qualified name and learning rate."""

    name: str
    learning_rate: float


class Samples(Protocol):
    """Reads the tasks of one kind for one model.

    Data sets and `collate` are pickled for each process that reads data; they hold what it needs and nothing else.
    """

    @property
    def family(self) -> ModelFamily:
        """The model's family."""

    def problems(self, model: PreTrainedModel) -> list[str]:
        """What is wrong with a loaded model for these samples, whatever the data; one sentence each."""

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        """Samples -> a batch: what the model takes, and `index`, -1 for a sample that only fills up."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Gives a model of the family's `load` or `skeleton` what the stream's tasks need."""

    def choose(self, model: PreTrainedModel, stage: int) -> None:
        """Makes the labels of the model's batches those of a stage's task."""

    def start(
        self, model: PreTrainedModel, stage: int, generator: torch.Generator, world: World
    ) -> dict[str, torch.Tensor]:
        """Values, by name, that parameters of the model before `stage` take when its training starts; on every rank.

        A model that tells nothing without them has them from now on; another one is measured as it is.
        """

    def beside(self, stage: int) -> TrainedModule | None:
        """What is trained beside the adapters in a stage."""

    def training(self, task: AnyTask, seed: int) -> TrainingData:
        """The task's training samples; `seed` fixes what is drawn at random."""

    def measured(self, task: AnyTask) -> TrainingData:
        """The same samples without anything random."""

    def answer(
        self,
        model: PreTrainedModel,
        stage: int,
        task: AnyTask,
        questions: Sequence[QuestionRecord],
        world: World,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """The answer of the model after `stage` to each question of a task, on every rank."""


def samples_of(config: RunConfig) -> Samples:
    """The samples of a run's tasks for its model.

    Raises:
        InputError: a model of another kind than the tasks, or a checkpoint that cannot be read.
    """
    from llava_cl.pipeline.conversations import Conversations
    from llava_cl.pipeline.image_classes import ImageClasses

    classes = isinstance(config.benchmark.tasks[0], ClassTaskConfig)
    with reading(config.model.path, "the checkpoint cannot be read"):
        return ImageClasses(config) if classes else Conversations(config)


def chosen_targets(config: RunConfig, family: ModelFamily, model: PreTrainedModel) -> dict[str, LinearTarget]:
    """The family's linears, or those of them whose own name is in `lora.targets`.

    Raises:
        InputError: a name that none of the family's linears has.
    """
    targets = family.linear_targets(model)
    if config.lora.targets is None:
        return targets
    leaves = {name: name.rpartition(".")[2] for name in targets}
    strange = sorted(set(config.lora.targets) - set(leaves.values()))
    if strange:
        known = sorted(set(leaves.values()))
        raise InputError(
            f"lora.targets: {', '.join(strange)} is none of {', '.join(known)}.{near_miss(strange[0], known)}"
        )
    return {name: target for name, target in targets.items() if leaves[name] in config.lora.targets}
