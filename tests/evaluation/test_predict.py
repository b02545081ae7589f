"""Batches of questions, and answers that depend on neither the batch nor the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.config import TaskConfig, load_config
from llava_cl.data import QuestionRecord, collate_prompts
from llava_cl.distributed import World
from llava_cl.evaluation.predict import predict, question_batches
from llava_cl.pipeline.conversations import Conversations
from llava_cl.pipeline.task_data import read_questions
from ranks import run_ranks

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))
LENGTHS = [3, 9, 4, 1, 9, 2, 7, 5, 5, 8, 6]


def test_batches_hold_every_question_once_the_longest_first() -> None:
    batches = question_batches(LENGTHS, 3)
    assert batches[0] == [1, 4, 9]
    assert [LENGTHS[index] for batch in batches for index in batch] == sorted(LENGTHS, reverse=True)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]


def test_questions_about_the_same_stand_together() -> None:
    batches = question_batches([5, 9, 5, 1, 7, 5], 2, ["a", "b", "a", "b", "c", "a"])
    assert batches == [[1, 3], [4, 0], [2, 5]]


def test_groups_of_equal_length_are_not_mixed() -> None:
    """Else what questions about one image begin with would be read in every batch that has one of them."""
    assert question_batches([5] * 6, 3, ["a", "b", "a", "b", "a", "b"]) == [[0, 2, 4], [1, 3, 5]]
    assert question_batches([4, 5, 5, 4], 2, ["a", "b", "a", "b"]) == [[2, 0], [1, 3]]


class _Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index}


def _batches_of(world: World, workers: int) -> tuple[list[str], list[list[int]]]:
    """All answers, and the batches that this rank saw."""
    seen: list[list[int]] = []

    def answer(batch: dict[str, torch.Tensor]) -> list[str]:
        assert torch.is_inference_mode_enabled()
        seen.append(batch["index"].tolist())
        return [f"{index} of {batch['index'].tolist()}" for index in batch["index"].tolist()]

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor([sample["index"] for sample in samples])}

    answers = predict(answer, _Numbers(), LENGTHS, batch_size=3, collate=collate, workers=workers, world=world)
    return answers, seen


@pytest.mark.distributed
def test_ranks_share_the_batches_of_one_process() -> None:
    alone, batches = _batches_of(ALONE, 0)
    assert [answer.split()[0] for answer in alone] == [str(index) for index in range(len(LENGTHS))]
    results = run_ranks(_batches_of, 2, 0)
    assert all(answers == alone for answers, _ in results)
    assert sorted(batch for _, seen in results for batch in seen) == sorted(batches)
    costs = [sum(LENGTHS[index] for batch in seen for index in batch) for _, seen in results]
    # Dealt out in turns they would be 38 and 21.
    assert sorted(costs) == [29, 30]


def test_worker_processes_change_nothing() -> None:
    assert _batches_of(ALONE, 2) == _batches_of(ALONE, 0)


def _several_about_each_image(questions: list[QuestionRecord]) -> list[QuestionRecord]:
    """Texts of different lengths about the same images, the images in turns."""
    texts = list(dict.fromkeys(question.text for question in questions))
    return [QuestionRecord(index, questions[index % 7].images, texts[index % len(texts)], "") for index in range(40)]


@pytest.fixture(scope="module")
def playground() -> tuple[Conversations, Any]:
    config = load_config(ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml")
    samples = Conversations(config)
    return samples, samples.family.load(ALONE.device)


@pytest.mark.parametrize("shared", [False, True])
def test_answers_are_those_of_transformers_one_at_a_time(playground: tuple[Conversations, Any], shared: bool) -> None:
    """Over the questions of all tasks, on the embedded model in fp32."""
    samples, model = playground
    config = samples._config
    tokenizer = samples.family.tokenizer()
    compared = 0
    for task in config.benchmark.evaluated:
        assert isinstance(task, TaskConfig)
        questions = list(read_questions(config, task))[:40]
        if shared:
            if task.name != "BaseQuestions":
                continue
            questions = _several_about_each_image(questions)
        got = samples.answer(model, 0, task, questions, ALONE, lambda done, total: None)
        for question, answer in zip(questions, got, strict=True):
            batch = collate_prompts([samples.questions(task, [question])[0]], tokenizer.pad_token_id)
            del batch["index"]
            with torch.inference_mode():
                made = model.generate(**batch, max_new_tokens=config.evaluation.max_new_tokens, do_sample=False)
            new = made[0, batch["input_ids"].shape[1] :]
            assert answer == tokenizer.decode(new, skip_special_tokens=True).strip(), question
            compared += 1
    assert compared == (40 if shared else 280)
