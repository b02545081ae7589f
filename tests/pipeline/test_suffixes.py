"""What a task adds to its questions: one suffix, or another where the reference answer has its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from llava_cl.config import BenchmarkConfig, TaskConfig, load_benchmark, shipped_benchmarks
from llava_cl.data import QuestionRecord
from llava_cl.pipeline.conversations import Conversations
from runs import tiny_config

ANSWERS = {"A": " pick", "Yes": " y/n", "yes": " pick", "No": "", "": " none", " Yes": " pick"}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    folder = tmp_path_factory.mktemp("suffixes")
    return Conversations(tiny_config(folder, tiny.run_content(folder)))


def asked(conversations: Conversations, task: TaskConfig, answers: list[str]) -> list[str]:
    """The questions with what is added to them, "?" being the question."""
    records = [QuestionRecord(number, (), "?", answer) for number, answer in enumerate(answers)]
    dataset = conversations.questions(task, records)
    assert [replace(record, text="?") for record in dataset.records] == records
    prompts = [conversations.chat.prompt(record.text, images=0) for record in dataset.records]
    assert [sample["input_ids"] for sample in dataset.__getitems__(range(len(records)))] == prompts
    return [record.text for record in dataset.records]


def test_the_suffix_of_the_reference_answer_takes_the_place_of_the_tasks(conversations: Conversations) -> None:
    by_answer = {"Yes": " y/n", "No": "", "": " none"}
    task = TaskConfig(name="T", test="q", images="i", scorer="exact", suffix=" pick", suffix_by_answer=by_answer)
    assert asked(conversations, task, list(ANSWERS)) == [f"?{suffix}" for suffix in ANSWERS.values()]
    plain = TaskConfig(name="T", test="q", images="i", scorer="exact")
    assert asked(conversations, plain, list(ANSWERS)) == ["?"] * len(ANSWERS)


def test_published_questions_of_finance_are_asked_for_what_they_are(conversations: Conversations) -> None:
    stream: BenchmarkConfig = load_benchmark(shipped_benchmarks()["dcl"])
    (task,) = (task for task in stream.tasks if isinstance(task, TaskConfig) and task.name == "Fin")
    letter = "? Answer with the given letter directly, e.g., A, B, C, D."
    yes_or_no = "? Only answer with yes or no directly."
    assert asked(conversations, task, ["B", "Yes", "No", "yes", "No."]) == [
        letter,
        yes_or_no,
        yes_or_no,
        letter,
        letter,
    ]
