"""Tasks of instructions: conversations to learn from, questions to answer in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llava_cl.config import RunConfig, TaskConfig
from llava_cl.data import (
    ConversationDataset,
    QuestionDataset,
    QuestionRecord,
    chat_format,
    collate_prompts,
    collate_train,
    load_question_records,
    load_train_records,
    modality_lengths,
)
from llava_cl.distributed import World
from llava_cl.evaluation.predict import predict
from llava_cl.models import ModelFamily
from llava_cl.pipeline.samples import TrainingData
from llava_cl.pipeline.scoring import evaluation_files


class Conversations:
    """Samples of instruction tasks for a vision-language model (see `llava_cl.pipeline.samples.Samples`)."""

    def __init__(self, config: RunConfig, family: ModelFamily) -> None:
        self._config = config
        self._family = family
        self._tokenizer = family.tokenizer()
        images = family.image_spec()
        self._chat = chat_format(family.chat, self._tokenizer, images.token_id, images.tokens)
        self._image_arguments: dict[str, Any] = {
            "image_size": images.size,
            "image_mean": images.mean,
            "image_std": images.std,
        }

    def training(self, task: TaskConfig) -> TrainingData:
        """Training samples, encoded on demand."""
        assert task.train is not None
        records = load_train_records(self._config.data_root / task.train)
        dataset = ConversationDataset(
            records,
            self._config.data_root / task.images,
            self._chat,
            max_length=self._config.training.max_length,
            **self._image_arguments,
        )
        return TrainingData(dataset, modality_lengths(records))

    def collate(self, samples: list[dict[str, Any]], *, with_index: bool = True) -> dict[str, torch.Tensor]:
        """A right-padded training batch."""
        batch = collate_train(samples, self._tokenizer.pad_token_id)
        if not with_index:
            del batch["index"]
        return batch

    def questions(self, task: TaskConfig) -> list[QuestionRecord]:
        """The records of the test or validation file."""
        return load_question_records(self._config.data_root / evaluation_files(task, self._config.evaluation)[0])

    def answer(
        self,
        model: PreTrainedModel,
        task: TaskConfig,
        questions: Sequence[QuestionRecord],
        world: World,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """Greedy answers, the task's suffix added to each question, special tokens skipped and ends stripped."""
        asked = [
            replace(record, text=record.text + task.suffix_by_answer.get(record.answer, task.suffix))
            for record in questions
        ]
        dataset = QuestionDataset(asked, self._config.data_root / task.images, self._chat, **self._image_arguments)

        def generate(samples: list[dict[str, Any]]) -> list[str]:
            prompts = collate_prompts(samples, self._tokenizer.pad_token_id)
            inputs = {key: value.to(world.device) for key, value in prompts.items() if key != "index"}
            tokens = self._family.generate(model, inputs, self._config.evaluation.max_new_tokens)
            texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
            return [text.strip() for text in texts]

        lengths = [len(record.text.split()) for record in questions]
        return predict(
            generate, dataset, lengths, batch_size=self._config.evaluation.batch_size, world=world, progress=progress
        )
