import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cl.data import QuestionRecord, load_question_records
from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS, ScoreResult, best_constant, score, unearned
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
        {"question_id": "2", "text": "a"},
        {"question_id": "b", "text": None},
        {"question_id": True, "text": "a"},
        {"text": "a"},
    ]
    with pytest.raises(InputError) as caught:
        score("exact", questions, answers)
    message = str(caught.value)
    assert "1 predictions have the id of an earlier one; keep one of each: 'a'." in message
    assert "2 predictions have an id that no question has: 'z', '2'." in message
    assert "2 of 4 questions have no prediction; predict them first: 'c', 1." in message
    assert "prediction 5 (question 'b'): text is None" in message
    assert "prediction 6: question_id is True" in message and "prediction 7: question_id is None" in message
    assert len(caught.value.problems) == 6


def test_an_id_is_the_same_as_a_number_and_as_text() -> None:
    questions = [QuestionRecord(0, (), "?", "a"), QuestionRecord("1", (), "?", "b"), QuestionRecord(-2, (), "?", "c")]
    answers = [{"question_id": id_, "text": text} for id_, text in (("0", "a"), (1, "x"), ("-2", "c"))]
    assert score("exact", questions, answers).credits == {0: 1, "1": 0, -2: 1}
    with pytest.raises(InputError, match="1 predictions have the id of an earlier one; keep one of each: 0"):
        score("exact", questions, [*answers, {"question_id": 0, "text": "a"}])
    with pytest.raises(InputError, match="3 predictions have an id that no question has"):
        score("exact", questions, [{"question_id": id_, "text": "a"} for id_ in ("00", "0 ", "+1")])


EARNS = {
    # scorer: references that their own text earns, those that it does not, and those that any answer earns
    "exact": (["red", "U.S.", "a b", "1.5"], [" red\n", "red ", "\tred"], [""]),
    "exact_stripped": (["red", "A", "u-s"], ["U.S.", "New York", "a.", " red", "Unanswerable"], [""]),
    "contains": (
        ["red", "U.S.", "a b"],
        [" red", "red\n", "Unanswerable", "so Unanswerable"],
        ["", " ", ",", ".", ", "],
    ),
    "contains_bounded": (["red", "a b", "No.", "1,5"], ["1.5", "U.S.", " red", "Unanswerable"], ["", ".", "...", " "]),
    "by_source": (["red", "a, b", "1.5"], ["red ", "Unanswerable"], ["", " ", ".", ","]),
}


def questions_of(answers: list[str], text: str = "?") -> list[QuestionRecord]:
    return [QuestionRecord(f"q{n}", ("MapQA_1.png",), text, answer) for n, answer in enumerate(answers)]


@pytest.mark.parametrize("scorer", [name for name, scorer in SCORERS.items() if scorer.credit])
def test_references_that_nothing_or_anything_earns_are_counted(scorer: str) -> None:
    good, never, always = EARNS[scorer]
    assert unearned(scorer, questions_of(good), None) == ([], [])
    for answer in never:
        (wrong,), told = unearned(scorer, questions_of([good[0], answer]), None)
        assert wrong == (
            f"1 of 2 questions' own reference does not earn full points with the scorer '{scorer}'; "
            "correct them or the scorer: 'q1'."
        ), answer
        assert told == []
    for answer in always:
        wrong, told = unearned(scorer, questions_of([good[0], answer]), None)
        said = "1 of 2 questions are earned by an answer that is empty or has no word with the scorer"
        assert any(problem.startswith(said) and problem.endswith(": 'q1'.") for problem in wrong), answer
        assert told == []


def test_a_share_of_a_tenth_is_only_told() -> None:
    questions = questions_of(["1.5", "1.5", *["red"] * 18])
    wrong, (told,) = unearned("contains_bounded", questions, None)
    assert wrong == [] and told.startswith("2 of 20 questions' own reference")
    assert len(unearned("contains_bounded", questions[:19], None)[0]) == 1


def test_lists_of_states_that_lose_an_item_to_a_space() -> None:
    states = "Which states?"
    assert unearned("by_source", questions_of(["Idaho, Ohio"], states), None) == ([], [])
    assert len(unearned("by_source", questions_of(["Idaho,Ohio "], states), None)[0]) == 1
    assert len(unearned("by_source", questions_of(["Idaho,"], states), None)[0]) == 1


@pytest.mark.parametrize("task", SCORER_OF)
def test_constants_earn_what_scoring_them_gives(task: str) -> None:
    questions = load_question_records(GOLDEN / task / "questions.json")
    scorer = SCORER_OF[task]
    answers = {"", *(question.answer.strip() for question in questions)}
    constant = [[{"question_id": question.id, "text": answer} for question in questions] for answer in answers]
    assert best_constant(scorer, questions) == max(score(scorer, questions, given).score for given in constant)


@pytest.mark.parametrize(
    ("scorer", "answers", "best"),
    [
        ("exact", ["Yes", "yes", "YES", "no", "no"], 60),
        ("exact", ["red ", "red", "blue", "green"], 25),
        ("exact_stripped", ["New York", "New York", "A"], 100 / 3),
        ("contains", ["no", "yes", "no, yes", "maybe"], 75),
        ("contains", ["", "a", "b", "b"], 75),
        ("contains_bounded", ["1.5", "1.5", "2"], 100 / 3),
        ("contains", ["Unanswerable", "Unanswerable", "red"], 100 / 3),
    ],
)
def test_the_best_constant_is_what_the_scorer_pays(scorer: str, answers: list[str], best: float) -> None:
    assert best_constant(scorer, questions_of(answers)) == pytest.approx(best)


def test_captions_have_no_best_constant() -> None:
    assert best_constant("caption", questions_of(["a"])) is None


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
