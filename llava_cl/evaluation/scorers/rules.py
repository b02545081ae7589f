"""Rules that give one prediction its points, exactly as the UCIT and MLLM-DCL benchmarks do, quirks included.

Each rule takes the question and the predicted text and returns a credit between 0 and 1. Where a benchmark's
rule finds an answer inside other words, a `strict_` rule shows what is left without that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_cl.data import QuestionRecord

    Credit = Callable[[QuestionRecord, str], float]

_TOKEN = re.compile(r"(?<!\w)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\w+")
_SOURCES_WITH_EXACT_ANSWERS = frozenset({"AI2D", "TQA", "VQA", "SciVerse"})


def unless_unanswerable(rule: Credit) -> Credit:
    """The rule of MLLM-DCL: no credit for a prediction that holds `Unanswerable` in this spelling."""

    def credit(question: QuestionRecord, prediction: str) -> float:
        return 0.0 if "Unanswerable" in prediction else rule(question, prediction)

    return credit


def exact(question: QuestionRecord, prediction: str) -> float:
    """Equal but for case; nothing is trimmed."""
    return float(prediction.upper() == question.answer.upper())


def exact_stripped(question: QuestionRecord, prediction: str) -> float:
    """Equal but for case, once all spaces and full stops are removed from the prediction alone."""
    return float(prediction.lower().replace(" ", "").replace(".", "") == question.answer.lower())


def contains(question: QuestionRecord, prediction: str) -> float:
    """The answer is part of the prediction but for case, be it inside a word; an empty answer always is."""
    return float(question.answer.lower() in prediction.lower())


def contains_bounded(question: QuestionRecord, prediction: str) -> float:
    """Like `contains`, but in a prediction of several words the answer needs a boundary on one side.

    That is a space before it, or a space, full stop or comma after it. An answer with a space needs none.
    Full stops are removed from an answer without one, so that `1.5` is looked for as `15`.
    """
    answer, predicted = question.answer.lower(), prediction.lower()
    if " " in answer:
        return float(answer in predicted)
    answer = answer.replace(".", "")
    if " " not in predicted:
        return float(answer in predicted)
    return float(any(form in predicted for form in (f" {answer}", f"{answer} ", f"{answer}.", f"{answer},")))


def by_source(question: QuestionRecord, prediction: str) -> float:
    """Exact but for case, or containment, by the source that the image's file name starts with.

    AI2D, TQA, VQA and SciVerse answers must be equal. For others the answer must be contained, but for
    questions with `Which states` it is the share of the answer's comma-separated items, untrimmed, that are
    among the prediction's; surplus items cost nothing.
    """
    answer, predicted = question.answer.lower(), prediction.lower()
    if _source(question) in _SOURCES_WITH_EXACT_ANSWERS:
        return float(predicted == answer)
    if not _asks_for_states(question):
        return float(answer in predicted)
    wanted, given = answer.split(","), set(predicted.split(","))
    return sum(item in given for item in wanted) / len(wanted)


def strict_contains(question: QuestionRecord, prediction: str) -> float:
    """The answer's words and numbers occur in a row in the prediction, whole, but for case.

    `10` does not hold `0`, nor `normal` `no`, and `1.5` is one number. An answer without any word needs a
    prediction without any.
    """
    answer, predicted = _tokens(question.answer), _tokens(prediction)
    if not answer:
        return float(not predicted)
    starts = range(len(predicted) - len(answer) + 1)
    return float(any(predicted[start : start + len(answer)] == answer for start in starts))


def strict_by_source(question: QuestionRecord, prediction: str) -> float:
    """Like `by_source`, with whole words, and lists compared as sets of trimmed items.

    For lists: the number of common items, divided by the number of items in either.
    """
    if _source(question) in _SOURCES_WITH_EXACT_ANSWERS:
        return by_source(question, prediction)
    if not _asks_for_states(question):
        return strict_contains(question, prediction)
    wanted, given = _items(question.answer), _items(prediction)
    return len(wanted & given) / len(wanted | given) if wanted | given else 1.0


def _source(question: QuestionRecord) -> str:
    (image,) = question.images
    return image.rpartition("/")[2].partition("_")[0]


def _asks_for_states(question: QuestionRecord) -> bool:
    return "Which states" in question.text


def _items(text: str) -> set[str]:
    return {item.strip() for item in text.lower().split(",") if item.strip()}


def _tokens(text: str) -> list[str]:
    return [token.replace(",", "") for token in _TOKEN.findall(text.lower())]
