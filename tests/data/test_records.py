"""Good files load; every fault of a bad one is named with file, record and field."""

import json
import logging

import pytest

from llava_cl.data import load_caption_references, load_question_records, load_train_records
from llava_cl.data.records import MAX_PROBLEMS, CaptionReference, QuestionRecord, TrainRecord
from llava_cl.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "records.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def turns(*texts, first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def problems(load, path):
    with pytest.raises(InputError) as caught:
        load(path)
    assert all(str(path) in problem for problem in caught.value.problems)
    return caught.value.problems


def test_train_records(write):
    path = write(
        [
            {"id": "a", "image": "x/1.jpg", "conversations": turns("<image>\nWhat?", "é日本")},
            {"question_id": 7, "image": ["1.jpg", "2.jpg"], "conversations": turns("<image> Which?", "")},
            {"conversations": turns("What?", "this"), "extra": 1},
            {"id": "d", "image": None, "conversations": turns("hello", "What?", "this", first="gpt")},
            {"id": "e", "image": ["1.jpg", "2.jpg"], "conversations": turns("<image> 1", "a", "<image> 2", "b")},
        ]
    )
    records = load_train_records(path)
    assert records[0] == TrainRecord("a", ("x/1.jpg",), tuple(turns("<image>\nWhat?", "é日本")))
    assert [record.id for record in records] == ["a", 7, 2, "d", "e"]
    assert [len(record.images) for record in records] == [1, 2, 0, 0, 2]
    assert records[3].conversations[0] == {"from": "gpt", "value": "hello"}


def test_byte_order_mark_is_accepted(write):
    path = write("\ufeff" + json.dumps([{"conversations": turns("What?", "this")}]))
    assert len(load_train_records(path)) == 1


def test_every_train_problem_is_listed(write):
    path = write(
        [
            "text",
            {"id": 1},
            {"conversations": []},
            {"conversations": [{"from": "system", "value": "x"}, {"from": "human"}, "turn"]},
            {"conversations": [{"from": "human", "value": 3}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            {"conversations": turns("x", first="gpt")},
            {"conversations": turns("", "")},
            {"image": [], "conversations": turns("x", "y")},
            {"image": ["a.png", 3], "conversations": turns("x", "y")},
            {"image": "a.png", "conversations": turns("<image> x", "y", "<image> z", "w")},
            {"image": "a.png", "conversations": turns("\ud800", "y")},
        ]
    )
    found = problems(load_train_records, path)
    places = [problem.split(": ", 1)[1].split(": ")[0] for problem in found]
    assert places == [
        "record[0]",
        "record[0], field 'conversations'",
        "record[1], field 'conversations'",
        "record[2], field 'conversations'",
        "record[3], field 'conversations[0]'",
        "record[3], field 'conversations[1].value'",
        "record[3], field 'conversations[2]'",
        "record[4], field 'conversations[0].value'",
        "record[5], field 'conversations[1].from'",
        "record[6], field 'conversations'",
        "record[7], field 'conversations'",
        "record[8], field 'image'",
        "record[9], field 'image'",
        "record[10], field 'conversations'",
        "record[11], field 'conversations[0].value'",
    ]


def test_long_lists_of_problems_are_cut_with_a_count(write):
    found = problems(load_train_records, write([{"conversations": 1}] * (MAX_PROBLEMS + 7)))
    assert len(found) == MAX_PROBLEMS + 1
    assert "7 more" in found[-1]
    assert len(problems(load_train_records, write([{"conversations": 1}] * MAX_PROBLEMS))) == MAX_PROBLEMS


def test_images_without_a_marker_are_reported(write, caplog):
    path = write([{"image": "a.png", "conversations": turns("What?", "this")}] * 3)
    with caplog.at_level(logging.WARNING):
        assert len(load_train_records(path)) == 3
    assert "3 records have an image but no turn with <image>" in caplog.text


@pytest.mark.parametrize("load", [load_train_records, load_question_records, load_caption_references])
def test_unreadable_files(write, tmp_path, load):
    assert "line 2, column 4" in problems(load, write("[\n  {id: 1}]"))[0]
    assert "line 2, column 1" in problems(load, write("[1,\n"))[0]
    assert "No such file" in problems(load, tmp_path / "absent.json")[0]
    assert "cannot be read" in problems(load, tmp_path)[0]
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    assert "not UTF-8 (byte 2)" in problems(load, latin)[0]
    problems(load, write("3"))


@pytest.mark.parametrize("load", [load_train_records, load_question_records])
def test_arrays_are_required(write, load):
    assert "holds a JSON dict" in problems(load, write({"a": 1}))[0]
    assert "holds no records" in problems(load, write([]))[0]


def test_question_records(write):
    path = write(
        [
            {"question_id": "q", "image": "a.png", "text": "What?", "answer": "B", "type": "x"},
            {"question_id": 0, "text": "", "answer": ""},
            {"question_id": "1", "image": ["a.png", "b.png"], "text": "<image>", "answer": "1"},
        ]
    )
    assert load_question_records(path) == [
        QuestionRecord("q", ("a.png",), "What?", "B"),
        QuestionRecord(0, (), "", ""),
        QuestionRecord("1", ("a.png", "b.png"), "<image>", "1"),
    ]


def test_every_question_problem_is_listed(write):
    path = write(
        [
            {"question_id": 5, "text": "What?", "answer": "B"},
            {"question_id": 5, "text": "What?", "answer": 3},
            {"text": "What?", "answer": "B"},
            {"question_id": True, "answer": "B"},
            [],
            {"question_id": "5", "text": "What?", "answer": "B"},
        ]
    )
    found = "\n".join(problems(load_question_records, path))
    for expected in (
        "record[1], field 'question_id': 5 is that of record[0] too",
        "record[1], field 'answer': is a int",
        "record[2], field 'question_id'",
        "record[3], field 'question_id'",
        "record[3], field 'text': is missing",
        "record[4]: is a list",
        "record[5], field 'question_id': '5' is that of record[0] too (1 and '1' are the same): make ids unique",
    ):
        assert expected in found


def test_caption_references(write):
    path = write(
        {
            "categories": [],
            "images": [{"id": 2, "file_name": "b.jpg"}, {"id": 1, "file_name": "a.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 1, "caption": "one"},
                {"id": 2, "image_id": 2, "caption": "two"},
                {"id": 3, "image_id": 1, "caption": "uno"},
            ],
        }
    )
    references = load_caption_references(path)
    assert references == {2: CaptionReference("b.jpg", ("two",)), 1: CaptionReference("a.jpg", ("one", "uno"))}
    assert list(references) == [2, 1]


def test_every_caption_problem_is_listed(write):
    path = write(
        {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}, {"id": 3, "file_name": 3}],
            "annotations": [{"image_id": 9, "caption": "x"}, {"image_id": [1], "caption": "x"}, {"image_id": 1}],
        }
    )
    found = "\n".join(problems(load_caption_references, path))
    for expected in (
        "images[1], field 'id'",
        "images[2], field 'file_name'",
        "annotations[0], field 'image_id': 9",
        "annotations[1], field 'image_id'",
        "annotations[2], field 'caption'",
        "images[2], field 'id': image 3 ('') has no caption",
    ):
        assert expected in found
    assert "lists 'images' and 'annotations'" in problems(load_caption_references, write({"images": []}))[0]


def test_ids_and_paths_that_no_file_can_hold(write):
    turned = turns("x", "y")
    found = problems(
        load_train_records,
        write(
            [
                {"id": "\ud800", "conversations": turned},
                {"id": True, "conversations": turned},
                {"image": "a\0b", "conversations": turned},
                {"image": ["a", "\udc00"], "conversations": turned},
            ]
        ),
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "record[0], field 'id'",
        "record[1], field 'id'",
        "record[2], field 'image'",
        "record[3], field 'image'",
    ]
    assert (
        "field 'question_id'"
        in problems(load_question_records, write([{"question_id": "\udfff", "text": "", "answer": ""}]))[0]
    )
    yes = {"images": [{"id": True, "file_name": "a"}], "annotations": [{"image_id": True, "caption": "x"}]}
    assert len(problems(load_caption_references, write(yes))) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 5000 + "]"])
@pytest.mark.parametrize("load", [load_train_records, load_question_records, load_caption_references])
def test_what_python_cannot_parse(load, text, write):
    assert "not valid JSON" in problems(load, write(text))[0]


def test_values_in_messages_are_cut_short(write):
    questions = [{"question_id": "q" * 10_000, "text": "", "answer": ""}] * 2
    assert len(problems(load_question_records, write(questions))[0]) < 500
