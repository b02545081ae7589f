"""Scores of a stage from its recorded predictions, without a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_cl.config import AnyTask, EvaluationConfig, RunConfig, TaskConfig
from llava_cl.data import load_caption_references, load_question_records
from llava_cl.evaluation.scorers import ScoreResult, best_constant, score
from llava_cl.pipeline.task_data import evaluation_files, read_questions
from llava_cl.store import StageDirectory, read_jsonl, write_json


def predictions_file(directory: StageDirectory, task: str) -> Path:
    """Where the answers to a task's questions are."""
    return directory.predictions / f"{task}.jsonl"


def answers_step(task: str) -> str:
    """Name of the step that records a task's predictions."""
    return f"evaluate-{task}"


def task_scorer(task: AnyTask, evaluation: EvaluationConfig) -> str:
    """Name of the scorer of a task: its own, or what the evaluation asks for in place of the COCO caption metrics."""
    return evaluation.caption_scorer if task.scorer == "caption" else task.scorer


def score_stage(config: RunConfig, directory: StageDirectory) -> dict[str, dict[str, Any]]:
    """Writes `scores.json` of a stage: for every task and probe the score, its parts, and credits by question.

    Returns:
        The scores by task.

    Raises:
        InputError: predictions or references that do not match the questions.
    """
    tasks = config.benchmark.evaluated_after(directory.stage)
    scores = {task.name: score_predictions(config, directory, task) for task in tasks}
    write_json(directory.scores, {"scores": scores})
    return scores


def score_predictions(config: RunConfig, directory: StageDirectory, task: AnyTask) -> dict[str, Any]:
    """The score of a task's recorded predictions at a stage, its parts, and credits by question.

    Raises:
        InputError: predictions or references that do not match the questions.
    """
    questions = read_questions(config, task)
    reference_file = evaluation_files(task, config.evaluation)[1] if isinstance(task, TaskConfig) else None
    references = load_caption_references(config.data_root / reference_file) if reference_file else None
    file = predictions_file(directory, task.name)
    scorer = task_scorer(task, config.evaluation)
    return {
        "scorer": scorer,
        "majority": best_constant(scorer, questions),
        **_as_json(score(scorer, questions, read_jsonl(file), references, source=file)),
    }


def score_files(
    task: AnyTask, questions: Path, answers: Path, references: Path | None, scorer: str | None = None
) -> dict[str, Any]:
    """Scores one task's predictions from files alone.

    Args:
        task: the task, for its scorer.
        questions: JSON array of `{"question_id", "image", "text", "answer"}`.
        answers: JSON Lines of `{"question_id", "text"}`, in any order.
        references: COCO style captions, for caption tasks.
        scorer: in place of the task's.

    Returns:
        `task`, `scorer`, `score` and `strict_score` (percent), `items`, `metrics` (percent), `credits` by question id.

    Raises:
        InputError: files that cannot be read, or predictions that do not match the questions.
    """
    captions = load_caption_references(references) if references else None
    name = scorer or task.scorer
    result = score(name, load_question_records(questions), read_jsonl(answers), captions, source=answers)
    return {"task": task.name, "scorer": name, **_as_json(result)}


def _as_json(result: ScoreResult) -> dict[str, Any]:
    return {**asdict(result), "credits": {str(question): credit for question, credit in result.credits.items()}}
