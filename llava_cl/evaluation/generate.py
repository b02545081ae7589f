"""Greedy answers to a task's questions: batched by length, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava_cl.data import collate_prompts
from llava_cl.distributed import World, gather_objects, local_share
from llava_cl.models import ModelFamily


def predict(
    family: ModelFamily,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's answer to every question, in the questions' order, on every rank.

    Args:
        family: the model's family, which generates.
        model: the model in evaluation mode.
        tokenizer: decodes the answers, special tokens skipped, ends stripped.
        questions: question samples by index, as of `llava_cl.data.QuestionDataset`.
        lengths: a length of each question; questions of like length share a batch.
        batch_size: questions in one batch.
        max_new_tokens: bound on an answer's length; generation stops at the end token.
        world: the process group.
        progress: called on every rank with its questions done and in all.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = local_share(batches, world)
    total = sum(len(batch) for batch in mine)
    answers: dict[int, str] = {}
    for batch in mine:
        prompts = collate_prompts([questions[index] for index in batch], tokenizer.pad_token_id)
        inputs = {key: value.to(world.device) for key, value in prompts.items() if key != "index"}
        with torch.inference_mode():
            tokens = family.generate(model, inputs, max_new_tokens)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers.update(zip(batch, (text.strip() for text in texts), strict=True))
        progress(len(answers), total)
    merged: dict[int, str] = {}
    for part in gather_objects(answers, world):
        merged.update(part)
    return [merged[index] for index in range(len(lengths))]
