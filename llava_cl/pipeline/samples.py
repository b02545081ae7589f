"""How the tasks of a run become samples and answers: the contract, and the choice by kind of task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from llava_cl.config import RunConfig, TaskConfig
from llava_cl.data import QuestionRecord
from llava_cl.distributed import World
from llava_cl.models import ModelFamily


class TrainingData(NamedTuple):
    """A task's training samples, and the length of each (see `llava_cl.data.GlobalBatchSampler`)."""

    dataset: Dataset[dict[str, Any]]
    lengths: list[int]


class Samples(Protocol):
    """Reads the tasks of one kind for one model."""

    def training(self, task: TaskConfig) -> TrainingData:
        """The task's training samples; index -1 is a sample without labels that only fills up a batch."""

    def collate(self, samples: list[dict[str, Any]], *, with_index: bool = True) -> dict[str, torch.Tensor]:
        """A training batch; `with_index=False` leaves out what the model does not take."""

    def questions(self, task: TaskConfig) -> list[QuestionRecord]:
        """The task's questions in the split that the run evaluates on."""

    def answer(
        self,
        model: PreTrainedModel,
        task: TaskConfig,
        questions: Sequence[QuestionRecord],
        world: World,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """The model's answer to each question, on every rank."""


def samples_of(config: RunConfig, family: ModelFamily) -> Samples:
    """The samples of a run's tasks for its model."""
    from llava_cl.pipeline.conversations import Conversations

    return Conversations(config, family)
