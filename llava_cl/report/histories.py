"""What became of the test questions: their points after every stage, and of a sample what the model said."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS
from llava_cl.report.load import RunRecord, read_file
from llava_cl.report.schema import StageScores, TaskScore
from llava_cl.store import read_jsonl

MOST_QUESTIONS = 360
"""At most this many questions are shown of a run, `PER_TASK` of a task."""
PER_TASK = 12
FEWEST = 4

_BEGINNING = re.compile(r'\{"question_id": ([0-9]+|"[^"\\]*"), ')


class Fate(StrEnum):
    """What became of a question since its task was learned."""

    FORGOTTEN = "learned, then forgotten"
    KEPT = "kept"
    GAINED = "gained later"
    NEVER = "never right"
    AHEAD = "not learned yet"


_SPREAD = (Fate.FORGOTTEN, Fate.KEPT, Fate.FORGOTTEN, Fate.GAINED, Fate.NEVER, Fate.AHEAD)
"""A sample is drawn from the fates in turn."""


class Said(NamedTuple):
    """The model's answer after a stage, None where it is not recorded any more, and its points."""

    text: str | None
    credit: float


@dataclass(frozen=True)
class History:
    """One question's way through the stages."""

    id: str
    fate: Fate
    prompt: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class TaskHistory:
    """What became of a task's questions.

    Attributes:
        task: its name.
        learned: the stage that learned it; for a probe the first that was evaluated.
        stages: the stages in which it was evaluated, 0 = the base.
        scale: points of a good answer; what has at least half of them counts as right.
        graded: answers have a score and are not right or wrong.
        fates: number of questions of each fate, all questions of the task.
        sample: some of its questions, those that were forgotten first.
    """

    task: str
    learned: int
    stages: tuple[int, ...]
    scale: float
    graded: bool
    fates: Mapping[Fate, int]
    sample: tuple[History, ...]


def fate(right: Sequence[bool]) -> Fate:
    """The fate of a question.

    Args:
        right: whether it was answered rightly after each stage since its task was learned; empty before that.
    """
    if not right:
        return Fate.AHEAD
    if right[-1]:
        return Fate.KEPT if right[0] else Fate.GAINED
    return Fate.FORGOTTEN if any(right) else Fate.NEVER


def read_histories(record: RunRecord) -> list[TaskHistory]:
    """The histories of every task and probe of a run, from the committed stages.

    Raises:
        InputError: scores or predictions that do not follow their schema.
    """
    problems: list[str] = []
    scores: dict[int, dict[str, TaskScore]] = {}
    for number, stage in sorted(record.stages.items()):
        if stage.committed and (stage.folder / "scores.json").is_file():
            content = read_file(StageScores, stage.folder / "scores.json", problems)
            scores[number] = content.scores if content else {}
    if problems:
        raise InputError(*problems)
    names = [*record.run.tasks, *record.run.probes]
    share = min(PER_TASK, max(FEWEST, MOST_QUESTIONS // len(names)))
    found = []
    for name in names:
        by_stage = {number: tasks[name] for number, tasks in scores.items() if name in tasks and tasks[name].credits}
        if by_stage:
            learned = record.run.tasks.index(name) + 1 if name in record.run.tasks else min(by_stage)
            folders = {number: record.stages[number].folder for number in by_stage}
            found.append(_task_history(name, learned, by_stage, folders, share))
    return found


def _task_history(
    task: str, learned: int, scores: Mapping[int, TaskScore], folders: Mapping[int, Path], share: int
) -> TaskHistory:
    stages = tuple(scores)
    first, *others = (score.credits for score in scores.values())
    ids = [id_ for id_ in first if all(id_ in credits for credits in others)]
    latest = scores[stages[-1]]
    graded = latest.scorer in SCORERS and SCORERS[latest.scorer].needs_references
    known = scores.get(learned, latest).credits
    scale = _good(list(known.values())) if graded else 1.0
    since = [score.credits for number, score in scores.items() if number >= learned]
    fates = {id_: fate([credits[id_] >= scale / 2 for credits in since]) for id_ in ids}
    chosen = choose(task, fates, share)
    texts = {number: _answers(folders[number] / "predictions" / f"{task}.jsonl", chosen) for number in stages}
    sample = []
    for id_ in chosen:
        rows = [texts[number].get(id_) for number in stages]
        said = tuple(
            Said(row["text"] if row else None, score.credits[id_])
            for row, score in zip(rows, scores.values(), strict=True)
        )
        prompt = next((row["prompt"] for row in rows if row), None)
        if prompt is not None:
            sample.append(History(id_, fates[id_], prompt, said))
    return TaskHistory(task, learned, stages, scale, graded, Counter(fates.values()), tuple(sample))


def _good(credits: Sequence[float]) -> float:
    """The points that one answer in twenty exceeds, so that a single odd one does not set the scale."""
    return max(sorted(credits)[int(0.95 * (len(credits) - 1))], 1e-9)


def choose(task: str, fates: Mapping[str, Fate], share: int) -> list[str]:
    """A spread over the fates, drawn by the questions' ids, so that it changes only where fates change.

    Args:
        task: the task's name, so that tasks with the same ids do not show the same places of their files.
        fates: question id -> fate.
        share: how many to choose.

    Returns:
        Ids, in the order of the fates.
    """
    drawn = sorted(fates, key=lambda id_: hashlib.sha256(f"{task}/{id_}".encode()).digest())
    waiting = {kind: [id_ for id_ in drawn if fates[id_] is kind] for kind in Fate}
    chosen: list[str] = []
    while len(chosen) < share and any(waiting.values()):
        for kind in _SPREAD:
            if waiting[kind] and len(chosen) < share:
                chosen.append(waiting[kind].pop(0))
    return sorted(chosen, key=lambda id_: list(Fate).index(fates[id_]))


def _answers(file: Path, ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Prompt and text of some questions, by id; nothing where the predictions have been removed."""
    if not file.is_file():
        return {}
    wanted = set(ids)
    written = {*wanted, *(json.dumps(id_, ensure_ascii=False) for id_ in ids)}

    def keep(line: str) -> bool:
        """Lines that begin as `write_jsonl` writes them can be told without being parsed."""
        found = _BEGINNING.match(line)
        return found is None or found[1] in written

    rows = {str(row.get("question_id")): row for row in read_jsonl(file, keep)}
    return {
        id_: {"prompt": str(rows[id_].get("prompt", "")), "text": str(rows[id_].get("text", ""))}
        for id_ in wanted & rows.keys()
    }
