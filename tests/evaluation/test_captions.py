import json
import math
import random
import shutil
from pathlib import Path

import pytest

from llava_cl.data import CaptionReference, QuestionRecord, load_caption_references, load_question_records
from llava_cl.errors import InputError, RunError
from llava_cl.evaluation import captions
from llava_cl.evaluation.scorers import SCORERS, reference_problems, score, unearned
from llava_cl.store import read_jsonl

GOLDEN = Path(__file__).parents[1] / "golden" / "captions"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")
pytest.importorskip("pycocoevalcap")


@needs_java
def test_the_coco_score_agrees_with_the_reference() -> None:
    questions = load_question_records(GOLDEN / "questions.json")
    references = load_caption_references(GOLDEN / "references.json")
    answers = read_jsonl(GOLDEN / "answers_raw.jsonl")
    random.Random(0).shuffle(answers)  # matched by id: the order of the lines does not matter
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    result = score("caption", questions, answers, references)
    assert result.metrics == pytest.approx(expected["scores_x100"], abs=1e-6)
    assert list(result.metrics) == list(expected["scores_x100"])
    assert result.score == pytest.approx(expected["average"], abs=1e-6)
    assert result.items == expected["n"] and result.strict_score is None
    for position, question in enumerate(questions, start=1):
        parts = expected["per_image"][str(position)]
        assert result.credits[question.id] == pytest.approx(sum(parts.values()) / 7, abs=1e-9)


@pytest.fixture
def without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves METEOR out: its process takes seconds to start, and the test is about the tokenizer."""
    monkeypatch.setattr(captions, "_meteor", lambda hypotheses, targets: (0.0, [0.0] * len(targets)))


@needs_java
@pytest.mark.usefixtures("without_meteor")
def test_line_breaks_in_a_caption_do_not_shift_the_others() -> None:
    texts = [f"a dog{mark}runs fast" for mark in ("\r", "\v", "\f", "\u2028", "\u2029", "\n", "\r\n", " ")]
    references = [["a dog runs fast", f"the dog{mark}runs"] for mark in ("\r", "\u2028", "", "", "", "", "", "")]
    found = captions.coco_scores([*texts, "a red bus stands"], [*references, ["a red bus stands"]])
    assert found.metrics["ROUGE_L"] == pytest.approx(100)
    assert found.metrics["Bleu_4"] == pytest.approx(100)


@needs_java
@pytest.mark.usefixtures("without_meteor")
def test_only_the_first_300_code_points_count() -> None:
    filler = "\U0001f600" * 290
    target = [["word " * 20], ["a cat"]]
    short = captions.coco_scores([filler + " a word ok", "a cat"], target)
    long = captions.coco_scores([filler + " a word ok" + " word" * 50, "a cat"], target)
    assert short == long


def test_coco_scores_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="need a Java runtime"):
        captions.coco_scores(["a"], [["a"]])
    with pytest.raises(InputError, match="need a Java runtime"):
        SCORERS["caption"].check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        SCORERS["caption"].check()
    assert len(caught.value.problems) == 2 and "llava_cl[captions]" in str(caught.value)
    with pytest.raises(InputError, match=r"llava_cl\[captions\]"):
        captions.overlap_scores(["a"], [["a"]])


def fake_java(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    command = directory / "java"
    command.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


def test_a_tokenizer_that_loses_lines_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_java(tmp_path, monkeypatch, "printf 'one\\ntwo\\nthree'")
    with pytest.raises(RunError, match="made 3 lines of 2 captions"):
        captions.coco_scores(["a", "b"], [["a"], ["b"]])


def test_a_failing_java_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_java(tmp_path, monkeypatch, "echo 'no heap' >&2; exit 1")
    with pytest.raises(RunError, match="Penn Treebank tokenizer failed: no heap"):
        captions.coco_scores(["a"], [["a"]])
    fake_java(tmp_path, monkeypatch, 'case "$*" in *PTBTokenizer*) cat;; *) exit 1;; esac')
    with pytest.raises(RunError, match="METEOR's Java process stopped"):
        captions.coco_scores(["a"], [["a"]])


def bleu_by_hand(matches: list[int], guesses: list[int], length: int, reference_length: int) -> list[float]:
    brevity = math.exp(min(0.0, 1 - reference_length / length))
    precisions = [match / guess for match, guess in zip(matches, guesses, strict=True)]
    return [100 * brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, len(matches) + 1)]


def test_overlap_by_hand_and_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    predictions = ["A cat sits, on the MAT!", "two red buses"]
    references = [["a dog sits on the mat", "the cat"], ["two red buses stand"]]
    found = captions.overlap_scores(predictions, references)
    # words: a cat sits on the mat (6; references 6 and 2 long), two red buses (3; reference 4 long)
    # 1-grams 6 + 3 of 6 + 3; 2-grams 3 + 2 of 5 + 2; 3-grams 2 + 1 of 4 + 1; 4-grams 1 + 0 of 3 + 0
    expected = bleu_by_hand([9, 5, 3, 1], [9, 7, 5, 3], length=9, reference_length=10)
    for n, value in enumerate(expected, start=1):
        assert found.metrics[f"Overlap_Bleu_{n}"] == pytest.approx(value, abs=1e-5)
    # the best precision and the best recall over the references: 5/6 and 5/6; 1 and 3/4; beta = 1.2
    rouge = [2.44 * p * r / (r + 1.44 * p) for p, r in ((5 / 6, 5 / 6), (1, 3 / 4))]
    assert found.metrics["Overlap_ROUGE_L"] == pytest.approx(100 * sum(rouge) / 2)
    assert set(found.metrics) == {*(f"Overlap_Bleu_{n}" for n in range(1, 5)), "Overlap_ROUGE_L"}
    assert found.score == pytest.approx(sum(found.metrics.values()) / 5)
    assert len(found.items) == 2 and all(0 <= item <= 1 for item in found.items)


def test_overlap_prints_nothing_and_cuts_at_300(capfd: pytest.CaptureFixture[str]) -> None:
    cut = "cat " * 75
    assert captions.overlap_scores([cut + "dog"], [["cat"]]) == captions.overlap_scores([cut], [["cat"]])
    assert captions.overlap_scores([""], [["a cat"]]).score == pytest.approx(0, abs=1e-6)
    assert capfd.readouterr() == ("", "")


def test_references_belong_to_the_questions_by_position() -> None:
    questions = [QuestionRecord(id_, (f"{id_}.jpg",), "?", "") for id_ in ("second", "first")]
    answers = [{"question_id": "first", "text": "a red bus"}, {"question_id": "second", "text": "a black cat"}]
    references = {2: CaptionReference("", ("a red bus",)), 1: CaptionReference("", ("a black cat",))}
    result = score("caption_overlap", questions, answers, references)
    assert result.metrics["Overlap_ROUGE_L"] == pytest.approx(100)
    assert set(result.credits) == {"first", "second"}
    swapped = {1: references[2], 2: references[1]}
    assert score("caption_overlap", questions, answers, swapped).metrics["Overlap_ROUGE_L"] < 50


def test_references_that_do_not_fit_are_refused() -> None:
    questions = [QuestionRecord(id_, ("x.jpg",), "?", "") for id_ in ("a", "b")]
    answers = [{"question_id": id_, "text": "a cat"} for id_ in ("a", "b")]
    with pytest.raises(InputError, match="needs the file of reference captions"):
        score("caption", questions, answers)
    with pytest.raises(InputError) as caught:
        score("caption", questions, answers, {1: CaptionReference("a", ()), 7: CaptionReference("b", ("x",))})
    assert "2 positions of questions have no reference caption" in caught.value.problems[0]
    assert "1 reference image ids are beyond the 2 questions" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("images", "name", "fits"),
    [
        (("VizWiz/val/a_1.jpg",), "a_1.jpg", True),
        (("VizWiz/val/a_1.jpg",), "other/A_1.JPEG", True),
        (("a_1.jpg", "b.jpg"), "b.jpg", True),
        (("a_1.jpg",), "", True),
        ((), "a_1.jpg", True),
        (("VizWiz/val/a_1.jpg",), "a_2.jpg", False),
        (("a_1.jpg",), "a", False),
        (("a_1.jpg", "b.jpg"), "c.jpg", False),
    ],
)
def test_references_are_of_the_questions_images(images: tuple[str, ...], name: str, fits: bool) -> None:
    questions = [QuestionRecord("first", (), "?", ""), QuestionRecord("second", images, "?", "")]
    references = {1: CaptionReference("z.jpg", ("a cat",)), 2: CaptionReference(name, ("a bus",))}
    problems = reference_problems("caption", questions, references)
    assert bool(problems) is not fits
    if not fits:
        assert "1 questions and references at one position name different images" in problems[0]
        assert f"2 ({images[0]}, {name})" in problems[0]


def test_references_that_are_shuffled_are_all_told() -> None:
    questions = [QuestionRecord(n, (f"{n}.jpg",), "?", "") for n in range(1, 4)]
    references = {n: CaptionReference(f"{n % 3 + 1}.jpg", ("a cat",)) for n in range(1, 4)}
    (problem,) = reference_problems("caption_overlap", questions, references)
    assert "3 questions" in problem and "1 (1.jpg, 2.jpg)" in problem and "3 (3.jpg, 1.jpg)" in problem


@pytest.mark.parametrize("scorer", ["caption", "caption_overlap"])
def test_captions_without_a_word_earn_nothing(scorer: str) -> None:
    questions = [QuestionRecord(f"q{n}", (), "?", "") for n in range(1, 4)]
    references = {n: CaptionReference("", ("...", "a cat")) for n in range(1, 4)}
    assert unearned(scorer, questions, references) == ([], [])
    references[2] = CaptionReference("", (". .", "!"))
    (wrong,), told = unearned(scorer, questions, references)
    assert wrong.startswith("1 of 3 questions' own reference does not earn full points") and "'q2'" in wrong
    assert told == []


def test_half_a_character_is_refused() -> None:
    question = QuestionRecord("a", ("x.jpg",), "?", "")
    references = {1: CaptionReference("a", ("a cat",))}
    with pytest.raises(InputError, match=r"1 predictions hold half of a surrogate pair.*: 'a'"):
        score("caption", [question], [{"question_id": "a", "text": "a \ud83d cat"}], references)
