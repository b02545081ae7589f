import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cl.data import QuestionRecord, load_question_records
from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS, ScoreResult, score
from llava_cl.store import read_jsonl

GOLDEN = Path(__file__).parents[1] / "golden" / "scorers"
SCORER_OF = {
    "ImageNet-R": "exact",
    "ArxivQA": "exact",
    "IconQA": "exact",
    "CLEVR-Math": "exact",
    "RS": "contains_bounded",
    "AD": "contains_bounded",
    "Med": "contains",
    "Sci": "by_source",
    "Fin": "exact_stripped",
}


@pytest.mark.parametrize("task", SCORER_OF)
def test_every_credit_agrees_with_the_reference(task: str) -> None:
    questions = load_question_records(GOLDEN / task / "questions.json")
    answers = read_jsonl(GOLDEN / task / "answers.jsonl")
    expected = json.loads((GOLDEN / task / "expected.json").read_text(encoding="utf-8"))
    result = score(SCORER_OF[task], questions, answers)
    credits = {item["question_id"]: item["credit"] for item in expected["credits"]}
    assert result.credits == pytest.approx(credits, abs=1e-12)
    assert list(result.credits) == [question.id for question in questions]
    assert result.score == pytest.approx(expected["score"], abs=1e-9)
    assert result.items == expected["n"] and result.metrics == {}
    random.Random(1).shuffle(answers)
    assert score(SCORER_OF[task], questions, answers) == result  # matched by id, never by line


def one(scorer: str, answer: str, prediction: str, text: str = "?", image: str = "MapQA_1.png") -> ScoreResult:
    question = QuestionRecord("q", (image,), text, answer)
    return score(scorer, [question], [{"question_id": "q", "text": prediction}])


@pytest.mark.parametrize(
    ("answer", "prediction", "credit", "strict"),
    [
        ("0", "10", 1, 0),
        ("no", "it is not", 1, 0),
        ("no", "No.", 1, 1),
        ("1.5", "1.5", 0, 1),
        ("1.5", "about 1.5m", 0, 1),
        ("1.5", "11.5", 0, 0),
        ("5", "1.5", 1, 0),
        ("1", "-1", 1, 0),
        ("4", "3-4 cars", 1, 1),
        ("1000", "1,000 cars", 0, 1),
        ("3", "13,4 and 5", 1, 0),
        ("turn left", "you turn left here", 1, 1),
        ("turn left", "return lefty", 1, 0),
        ("", "word", 1, 0),
        ("", "", 1, 1),
        ("...", "!", 1, 1),
        ("rural", "Unanswerable, rural", 0, 0),
    ],
)
def test_bounded_containment_and_its_strict_form(answer: str, prediction: str, credit: float, strict: float) -> None:
    result = one("contains_bounded", answer, prediction)
    assert (result.score, result.strict_score) == (100 * credit, 100 * strict)


def test_containment_and_its_strict_form() -> None:
    assert (one("contains", "no", "normal").score, one("contains", "no", "normal").strict_score) == (100, 0)
    assert one("contains", "H&E", "the h&e stain").strict_score == 100


@pytest.mark.parametrize(
    ("answer", "prediction", "credit", "strict"),
    [
        ("Idaho, Ohio", "Ohio, Idaho", 0, 1),
        ("Idaho,Ohio", "Idaho,Ohio,Iowa,Utah", 1, 0.5),
        ("Idaho", "", 0, 0),
        ("", "", 1, 1),
        ("Idaho,Ohio", "Unanswerable", 0, 0),
    ],
)
def test_lists_of_states(answer: str, prediction: str, credit: float, strict: float) -> None:
    result = one("by_source", answer, prediction, text="Which states are red?")
    assert (result.score, result.strict_score) == (100 * credit, 100 * strict)


def test_source_decides_between_equality_and_containment() -> None:
    assert one("by_source", "b", "crab", image="images/AI2D_1.png").score == 0
    assert one("by_source", "b", "crab", image="AI2D_images/MapQA_1.png").score == 100
    assert one("by_source", "b", "crab", image="AI2D_images/MapQA_1.png").strict_score == 0
    assert one("by_source", "b", "B", image="images/TQA_a_b.png").strict_score == 100


def test_only_rules_with_false_positives_have_a_strict_form() -> None:
    strict = {name for name, scorer in SCORERS.items() if scorer.strict is not None}
    assert strict == {"contains", "contains_bounded", "by_source"}
    assert one("exact", "a", "A").strict_score is None


@pytest.mark.parametrize("scorer", ["contains", "contains_bounded", "by_source", "exact_stripped"])
@given(answer=st.text(max_size=6), around=st.text(max_size=4))
def test_unanswerable_earns_nothing(scorer: str, answer: str, around: str) -> None:
    result = one(scorer, answer, f"{answer}{around}Unanswerable")
    assert result.score == 0 and result.strict_score in (None, 0)


@given(st.lists(st.sampled_from(["right", "wrong"]), min_size=1, max_size=9))
def test_the_denominator_is_the_number_of_questions(texts: list[str]) -> None:
    questions = [QuestionRecord(number, (), "?", "right") for number in range(len(texts))]
    answers = [{"question_id": number, "text": text} for number, text in enumerate(texts)]
    assert score("exact", questions, answers).score == pytest.approx(100 * texts.count("right") / len(texts))


def test_ids_must_match_in_full_and_all_problems_are_listed() -> None:
    questions = [QuestionRecord(id_, (), "?", "a") for id_ in ("a", "b", "c", 1)]
    answers: list[dict[str, Any]] = [
        {"question_id": "a", "text": "a"},
        {"question_id": "a", "text": "b"},
        {"question_id": "z", "text": "a"},
        {"question_id": "1", "text": "a"},
        {"question_id": "b", "text": None},
        {"question_id": True, "text": "a"},
        {"text": "a"},
    ]
    with pytest.raises(InputError) as caught:
        score("exact", questions, answers)
    message = str(caught.value)
    assert "1 predictions have the id of an earlier one; keep one of each: 'a'." in message
    assert "2 predictions have an id that no question has: 'z', '1'." in message
    assert "2 of 4 questions have no prediction; predict them first: 'c', 1." in message
    assert "prediction 5 (question 'b'): text is None" in message
    assert "prediction 6: question_id is True" in message and "prediction 7: question_id is None" in message
    assert len(caught.value.problems) == 6


def test_long_lists_of_ids_are_cut() -> None:
    questions = [QuestionRecord(number, (), "?", "a") for number in range(12)]
    with pytest.raises(InputError, match=r"12 of 12 questions .*: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\.$"):
        score("exact", questions, [])


def test_what_a_scorer_cannot_use_is_refused() -> None:
    with pytest.raises(InputError, match="unknown scorer 'exakt'; known: by_source, caption"):
        score("exakt", [], [])
    with pytest.raises(InputError, match="there are none to score"):
        score("exact", [], [])
    question = QuestionRecord("q", ("a.png", "b.png"), "?", "a")
    with pytest.raises(InputError, match="1 questions do not have one image"):
        score("by_source", [question], [{"question_id": "q", "text": "a"}])
