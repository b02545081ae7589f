"""Scores of a task from its recorded predictions, matched to the questions by id."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llava_cl.errors import InputError
from llava_cl.evaluation import captions
from llava_cl.evaluation.scorers import rules
from llava_cl.parsing import SURROGATE, near_miss, shown

if TYPE_CHECKING:
    from llava_cl.data import CaptionReference, QuestionRecord

_LISTED = 10
_UNEARNED = 0.1
"""Most of a task's questions, as a share, whose references may be wrong for the scorer; published ones have some."""
_NOISE = "\ue000 \ue000, \ue000."
"""A constant answer: characters that no reference has, with the marks at which some rules look for words."""
_CONSTANTS = 200


@dataclass(frozen=True)
class ScoreResult:
    """The score of one task.

    Attributes:
        score: percent, by the benchmark's rule.
        strict_score: percent, by the stricter form of the rule; None where there is none.
        items: number of questions.
        metrics: the parts of a caption score, percent; empty for other scorers.
        credits: question id -> points, in the questions' order. Their mean is score / 100, except for
            captions, where it is the mean of the sentence's own metrics.
    """

    score: float
    strict_score: float | None
    items: int
    metrics: dict[str, float]
    credits: dict[str | int, float]


@dataclass(frozen=True)
class Scorer:
    """One way to score a task: a rule for every prediction, or a measure of all captions.

    Attributes:
        credit: points of one prediction.
        strict: the same by a stricter rule, where the benchmark's finds answers inside other words.
        captions: scores of all captions against their references; in place of `credit`.
        check: raises InputError if something is not installed that the scorer needs.
        needs_image: every question must have one image, whose name the rule reads beside the question's text; other
            rules read nothing of a question but its answer.
    """

    credit: rules.Credit | None = None
    strict: rules.Credit | None = None
    captions: Callable[[Sequence[str], Sequence[Sequence[str]]], captions.CaptionScores] | None = None
    check: Callable[[], None] = field(default=lambda: None)
    needs_image: bool = False

    @property
    def needs_references(self) -> bool:
        """Whether a file of caption references is needed."""
        return self.captions is not None


SCORERS: dict[str, Scorer] = {
    "exact": Scorer(credit=rules.exact),
    "contains_bounded": Scorer(
        credit=rules.unless_unanswerable(rules.contains_bounded),
        strict=rules.unless_unanswerable(rules.strict_contains),
    ),
    "contains": Scorer(
        credit=rules.unless_unanswerable(rules.contains), strict=rules.unless_unanswerable(rules.strict_contains)
    ),
    "by_source": Scorer(
        credit=rules.unless_unanswerable(rules.by_source),
        strict=rules.unless_unanswerable(rules.strict_by_source),
        needs_image=True,
    ),
    "exact_stripped": Scorer(credit=rules.unless_unanswerable(rules.exact_stripped)),
    "caption": Scorer(captions=captions.coco_scores, check=captions.check_coco_tools),
    "caption_overlap": Scorer(captions=captions.overlap_scores, check=captions.check_overlap_tools),
}
"""Every scorer by the name that a benchmark's configuration uses."""


def score(
    scorer_name: str,
    questions: Sequence[QuestionRecord],
    answers: Sequence[Mapping[str, Any]],
    references: Mapping[int, CaptionReference] | None = None,
    *,
    source: Path | None = None,
) -> ScoreResult:
    """Scores the predictions of one task: 100 * points / number of questions.

    Args:
        scorer_name: a key of `SCORERS`.
        questions: all questions of the task, in the order of the test file.
        answers: one `{"question_id", "text"}` for every question, in any order; other keys are ignored.
        references: caption references by image id, which is the question's position from 1.
        source: the file of the predictions, for messages.

    Raises:
        InputError: an unknown scorer; predictions that are missing, surplus, doubled or no text; questions or
            references that the scorer cannot use; or a tool that is not installed. Lists all that is wrong.
        RunError: a tool failed.
    """
    scorer = SCORERS.get(scorer_name)
    if scorer is None:
        known = f"{', '.join(sorted(SCORERS))}.{near_miss(scorer_name, SCORERS)}"
        raise InputError(f"unknown scorer '{scorer_name}'; known: {known}")
    predictions, unmatched = _matched(questions, answers)
    if scorer.captions is not None:
        broken = [id_ for id_, text in predictions.items() if SURROGATE.search(text)]
        unmatched += _listed(broken, "predictions hold half of a surrogate pair, which is no character")
    problems = [f"{source}: {problem}" if source else problem for problem in unmatched]
    problems += reference_problems(scorer_name, questions, references)
    if problems:
        raise InputError(*problems)
    if scorer.captions is not None:
        assert references is not None
        targets = [references[number].captions for number in range(1, len(questions) + 1)]
        measured = scorer.captions([predictions[question.id] for question in questions], targets)
        credits = dict(zip(predictions, measured.items, strict=True))
        return ScoreResult(measured.score, None, len(questions), measured.metrics, credits)
    assert scorer.credit is not None
    credits = {question.id: scorer.credit(question, predictions[question.id]) for question in questions}
    strict_score = None
    if scorer.strict is not None:
        strict_score = _percent([scorer.strict(question, predictions[question.id]) for question in questions])
    return ScoreResult(_percent(list(credits.values())), strict_score, len(questions), {}, credits)


def _percent(credits: Sequence[float]) -> float:
    return 100 * sum(credits) / len(credits)


def _matched(
    questions: Sequence[QuestionRecord], answers: Sequence[Mapping[str, Any]]
) -> tuple[dict[str | int, str], list[str]]:
    """Question id -> predicted text, in the questions' order, and what is wrong with the predictions."""
    problems = [] if questions else ["questions: there are none to score."]
    texts: dict[str, str] = {}
    doubled = []
    for number, answer in enumerate(answers, start=1):
        id_, text = answer.get("question_id"), answer.get("text")
        if isinstance(id_, bool) or not isinstance(id_, str | int):
            problems.append(f"prediction {number}: question_id is {shown(id_)}, but must be a string or an integer.")
        elif not isinstance(text, str):
            where = f"prediction {number} (question {shown(id_)})"
            problems.append(f"{where}: text is {shown(text)}, but must be a string.")
            texts.setdefault(str(id_), "")
        elif str(id_) in texts:
            doubled.append(id_)
        else:
            texts[str(id_)] = text
    known = {str(question.id) for question in questions}
    problems += _listed(doubled, "predictions have the id of an earlier one; keep one of each")
    problems += _listed([id_ for id_ in texts if id_ not in known], "predictions have an id that no question has")
    missing = [question.id for question in questions if str(question.id) not in texts]
    problems += _listed(missing, f"of {len(questions)} questions have no prediction; predict them first")
    return {question.id: texts.get(str(question.id), "") for question in questions}, problems


def reference_problems(
    scorer_name: str, questions: Sequence[QuestionRecord], references: Mapping[int, CaptionReference] | None
) -> list[str]:
    """What keeps a scorer from scoring these questions, whatever the predictions are: one sentence each."""
    scorer = SCORERS[scorer_name]
    if scorer.needs_image:
        wrong = [question.id for question in questions if len(question.images) != 1]
        return _listed(wrong, "questions do not have one image, whose name tells the scorer the source")
    if not scorer.needs_references:
        return []
    if references is None:
        return ["references: a caption score needs the file of reference captions."]
    positions = range(1, len(questions) + 1)
    without = [number for number in positions if number not in references or not references[number].captions]
    surplus = [number for number in references if number not in positions]
    where = "image ids are the questions' positions from 1"
    others = [
        f"{number} ({question.images[0]}, {references[number].file_name})"
        for number, question in enumerate(questions, start=1)
        if number in references and not _shows(question, references[number].file_name)
    ]
    return [
        *_listed(without, f"positions of questions have no reference caption ({where})"),
        *_listed(surplus, f"reference image ids are beyond the {len(questions)} questions ({where})"),
        *_listed(others, f"questions and references at one position name different images ({where})"),
    ]


def _shows(question: QuestionRecord, name: str) -> bool:
    """Whether a file name is that of one of a question's images, whatever their folders and suffixes."""
    own = {PurePosixPath(path).stem.casefold() for path in (name, *question.images)}
    return not (name and question.images) or len(own) <= len(question.images)


def unearned(
    scorer_name: str, questions: Sequence[QuestionRecord], references: Mapping[int, CaptionReference] | None
) -> tuple[list[str], list[str]]:
    """Questions whose own reference does not earn full points, and those that an answer without meaning earns.

    Returns:
        What is wrong with so many of them that the scores would mean nothing, and what is only to be told.
    """
    credit = SCORERS[scorer_name].credit
    always: list[str | int] = []
    if credit is None:
        assert references is not None
        own = [any(re.search(r"\w", text) for text in references[n].captions) for n in range(1, len(questions) + 1)]
    else:
        # Answers are recorded without spaces at their ends.
        own = [credit(question, question.answer.strip()) == 1 for question in questions]
        always = [question.id for question in questions if credit(question, "") or credit(question, _NOISE)]
    never = [question.id for question, earns in zip(questions, own, strict=True) if not earns]
    wrong: list[str] = []
    told: list[str] = []
    for ids, what in (
        (never, "questions' own reference does not earn full points"),
        (always, "questions are earned by an answer that is empty or has no word"),
    ):
        found = _listed(ids, f"of {len(questions)} {what} with the scorer '{scorer_name}'; correct them or the scorer")
        (wrong if len(ids) > _UNEARNED * len(questions) else told).extend(found)
    return wrong, told


def best_constant(scorer_name: str, questions: Sequence[QuestionRecord]) -> float | None:
    """The score, in percent, of the one answer that earns most if it is given to all questions; None for captions.

    It is the empty one or one of the 200 most frequent references.
    """
    scorer = SCORERS[scorer_name]
    if scorer.credit is None:
        return None
    read = questions if scorer.needs_image else [replace(item, id=0, images=(), text="") for item in questions]
    frequent = Counter(question.answer.strip() for question in questions).most_common(_CONSTANTS)
    counts = Counter(read)
    sums = (
        sum(count * scorer.credit(question, answer) for question, count in counts.items())
        for answer in ("", *(answer for answer, _ in frequent))
    )
    return 100 * max(sums) / len(questions)


def _listed(ids: Sequence[str | int], what: str) -> list[str]:
    if not ids:
        return []
    first = ", ".join(map(shown, ids[:_LISTED]))
    return [f"{len(ids)} {what}: {first}{', ...' if len(ids) > _LISTED else ''}."]
