"""Tasks of instructions: conversations to learn from, questions to answer in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from llava_cl.config import AnyTask, RunConfig, TaskConfig
from llava_cl.data import (
    ConversationDataset,
    QuestionDataset,
    QuestionRecord,
    chat_format,
    collate_prompts,
    collate_train,
    load_train_records,
    modality_lengths,
)
from llava_cl.data.conversation import IMAGE_MARKER
from llava_cl.distributed import World
from llava_cl.errors import InputError, problems_of
from llava_cl.evaluation.predict import predict
from llava_cl.models import LanguageFamily, language_family
from llava_cl.pipeline.samples import TrainedModule, TrainingData


class Conversations:
    """Samples of instruction tasks for a vision-language model (see `llava_cl.pipeline.samples.Samples`).

    Attributes:
        chat: the format of the model's conversations.
        collate: samples -> a right-padded training batch.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.family: LanguageFamily = language_family(config.model)
        self._tokenizer = self.family.tokenizer()
        images = self.family.image_spec()
        self.chat = chat_format(self.family.chat, self._tokenizer, images.token_id, images.tokens)
        self.collate = partial(collate_train, pad_id=self._tokenizer.pad_token_id)
        self._image_arguments: dict[str, Any] = {
            "image_size": images.size,
            "image_mean": images.mean,
            "image_std": images.std,
        }

    def problems(self, model: PreTrainedModel) -> list[str]:
        """Tokens that the model has no row for, and lengths beyond its positions."""
        config, tokenizer, images = self._config, self._tokenizer, self.family.image_spec()
        embeddings: Any = model.get_input_embeddings()
        rows, positions, ends = embeddings.num_embeddings, self.family.positions(), model.generation_config.eos_token_id
        ids: dict[Any, str] = {id_: word for word, id_ in tokenizer.get_vocab().items() if word != IMAGE_MARKER}
        ids.update(dict.fromkeys(ends if isinstance(ends, list) else [ends], "what ends an answer, eos_token_id,"))
        ids[images.token_id] = "the image token"
        beyond = [id_ for id_ in ids if not (isinstance(id_, int) and 0 <= id_ < rows)]
        problems = list(problems_of(lambda: self.chat.prompt("", images=0)))
        if beyond:
            problems.append(
                f"{config.model.path}: the embedding has {rows} rows, and {len(beyond)} tokens have none: "
                f"{ids[beyond[0]]} has the id {beyond[0]}. Give the tokenizer that the model was trained with."
            )
        if tokenizer.pad_token_id is None:
            problems.append(f"{config.model.path}: the tokenizer has no token that pads; set its pad_token.")
        length, new = config.training.max_length, config.evaluation.max_new_tokens
        if length > positions:
            problems.append(f"training.max_length: {length} is more than the model's {positions} positions.")
        if images.tokens + new >= positions:
            problems.append(
                f"evaluation.max_new_tokens: {new} after the {images.tokens} tokens of an image leave no room for a "
                f"question in the model's {positions} positions."
            )
        return problems

    def check_lengths(self, task: TaskConfig, questions: Sequence[QuestionRecord]) -> None:
        """Checks that the model has positions for a task's questions and their answers.

        Raises:
            InputError: it has too few, or a question cannot be encoded.
        """
        new, positions = self._config.evaluation.max_new_tokens, self.family.positions()
        lengths = self.questions(task, questions).lengths()
        over = [index for index, length in enumerate(lengths) if length + new > positions]
        if over:
            longest = max(over, key=lengths.__getitem__)
            raise InputError(
                f"{len(over)} questions are too long for the model's {positions} positions: record {longest} (id "
                f"{questions[longest].id}) has {lengths[longest]} tokens, and its answer takes "
                f"evaluation.max_new_tokens = {new}. Shorten them."
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """Nothing is needed."""

    def choose(self, model: PreTrainedModel, stage: int) -> None:
        """Labels are tokens, whatever the task."""

    def start(
        self, model: PreTrainedModel, stage: int, generator: torch.Generator, world: World
    ) -> dict[str, torch.Tensor]:
        """The projector starts as it is."""
        return {}

    def beside(self, stage: int) -> TrainedModule | None:
        """The projector, unless it is frozen."""
        rate = self._config.training.projector_learning_rate
        return TrainedModule(self.family.projector_prefix(), rate) if rate else None

    def training(self, task: AnyTask, seed: int) -> TrainingData:
        """Training samples, encoded on demand."""
        assert isinstance(task, TaskConfig) and task.train is not None
        records = load_train_records(self._config.data_root / task.train)
        dataset = ConversationDataset(
            records,
            self._config.data_root / task.images,
            self.chat,
            max_length=self._config.training.max_length,
            **self._image_arguments,
        )
        return TrainingData(dataset, modality_lengths(records), [record.id for record in records])

    def measured(self, task: AnyTask) -> TrainingData:
        """The training samples; nothing about them is random."""
        return self.training(task, 0)

    def questions(self, task: TaskConfig, questions: Sequence[QuestionRecord]) -> QuestionDataset:
        """Prompts of a task's questions, the task's suffix added to each."""
        asked = [
            replace(record, text=record.text + task.suffix_by_answer.get(record.answer, task.suffix))
            for record in questions
        ]
        return QuestionDataset(asked, self._config.data_root / task.images, self.chat, **self._image_arguments)

    def answer(
        self,
        model: PreTrainedModel,
        stage: int,
        task: AnyTask,
        questions: Sequence[QuestionRecord],
        world: World,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """Greedy answers, the task's suffix added to each question, special tokens skipped and ends stripped."""
        assert isinstance(task, TaskConfig)
        dataset = self.questions(task, questions)

        def generate(batch: dict[str, torch.Tensor]) -> list[str]:
            inputs = {key: value.to(world.device) for key, value in batch.items() if key != "index"}
            tokens = self.family.generate(model, inputs, self._config.evaluation.max_new_tokens)
            texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
            return [text.strip() for text in texts]

        return predict(
            generate,
            dataset,
            dataset.lengths(),
            groups=[record.images for record in questions],
            batch_size=self._config.evaluation.batch_size,
            collate=partial(collate_prompts, pad_id=self._tokenizer.pad_token_id),
            workers=self._config.training.workers,
            world=world,
            progress=progress,
        )
