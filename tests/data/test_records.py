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
            {"image": "a.png", "conversations": turns("<image> \ud800", "y")},
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
    unseen = {"image": "a.png", "conversations": turns("What?", "this")}
    path = write([unseen, {"image": "a.png", "conversations": turns("<image> What?", "this")}, unseen])
    with caplog.at_level(logging.WARNING):
        assert len(load_train_records(path)) == 3
    assert "2 records have an image but no turn with <image>" in caplog.text


def test_a_file_whose_images_no_turn_shows_is_refused(write):
    path = write([{"conversations": turns("a", "b")}] + [{"image": "a.png", "conversations": turns("x", "y")}] * 3)
    found = problems(load_train_records, path)
    assert len(found) == 1
    assert "<image>" in found[0]


IN_PLACE_OF_IMAGE = [
    "images",
    "Image",
    "IMAGE",
    "image_path",
    "imagePath",
    "image_file",
    "img",
    "imgs",
    "picture",
    "pictures",
    "pic",
    "photo",
    "image_url",
    "image_1",
    "imgae",
]


@pytest.mark.parametrize("key", [*IN_PLACE_OF_IMAGE, "image ", " image", "Image Path", "imag"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
def test_a_key_in_place_of_image_is_refused_and_told_once(key, value, write):
    question = {"question_id": 1, "text": "x", "answer": "y", key: value}
    said = f"record[0], field {key!r}: is not known and 'image' is missing: call it so"
    assert problems(load_question_records, write([question])) == (f"{write([question])}: {said}",)
    for other in ({}, {"image": None}):
        path = write([{**other, "conversations": turns("<image> x", "y"), key: value}] * 5)
        assert problems(load_train_records, path) == (f"{path}: {said} (and 4 more like it)",)


@pytest.mark.parametrize(
    ("known", "key"),
    [
        ("question_id", "questionId"),
        ("question_id", "id"),
        ("text", "question"),
        ("text", "Text"),
        ("text", "prompt"),
        ("answer", "answers"),
        ("answer", "label"),
        ("answer", "anwser"),
    ],
)
def test_keys_of_questions_that_are_called_otherwise(known, key, write):
    question = {"question_id": 1, "text": "x", "answer": "y"}
    question[key] = question.pop(known)
    found = problems(load_question_records, write([question]))
    assert len(found) == 1
    assert f"field {key!r}: is not known and {known!r} is missing" in found[0]


@pytest.mark.parametrize("key", ["conversation", "Conversations", "messages", "conversatoins"])
def test_conversations_that_are_called_otherwise(key, write):
    found = problems(load_train_records, write([{key: turns("x", "y"), "ID": 3}]))
    assert [problem.split(": ")[1] for problem in found] == ["record[0], field 'ID'", f"record[0], field {key!r}"]


def test_keys_of_captions_that_are_called_otherwise(write):
    path = write(
        {
            "images": [{"Id": 1, "filename": "a.jpg"}],
            "annotations": [{"imageId": 1, "caption": "x"}, {"image_id": 1, "Caption": "x"}],
        }
    )
    found = "\n".join(problems(load_caption_references, path))
    for place in ("images[0], field 'Id'", "images[0], field 'filename'", "annotations[0], field 'imageId'"):
        assert place in found
    assert "annotations[1], field 'Caption': is not known and 'caption' is missing" in found
    assert found.count("\n") == 3


def test_other_keys_are_allowed_also_beside_those_they_are_like(write):
    extra = {"image_id": "COCO_1", "source": "a.png", "type": "x", "Image": "b.png", "1": 1, "": 2, "width": 3}
    train = {"id": 1, "image": "a.png", "conversations": turns("<image> x", "y"), **extra}
    assert load_train_records(write([train]))[0].images == ("a.png",)
    blind = {"conversations": turns("x", "y"), "images": [], "picture": None, "image_id": "COCO_1", "uid": 3, "1": 1}
    assert load_train_records(write([train, blind]))[1] == TrainRecord(1, (), tuple(turns("x", "y")))
    question = {"question_id": 1, "id": 5, "text": "x", "answer": "y", "question": "z", "images": [], "label": 3}
    assert load_question_records(write([question])) == [QuestionRecord(1, (), "x", "y")]


MARKERS = [
    # images, markers in each turn of the human, whether that fits
    (0, (0,), True),
    (0, (1,), False),
    (0, (0, 2), False),
    (1, (1,), True),
    (1, (2,), False),
    (1, (1, 1), False),
    (2, (1,), True),
    (2, (2,), True),
    (2, (1, 1), True),
    (2, (2, 1), False),
    (2, (2, 0), True),
    (3, (2,), False),
    (3, (1, 1), False),
    (3, (2, 1), False),
    (3, (4,), False),
    (3, (1, 1, 1), True),
    (4, (2, 2), False),
]


@pytest.mark.parametrize(("images", "markers", "fits"), MARKERS)
def test_the_number_of_markers_is_that_of_images_or_one(images, markers, fits, write):
    names = [f"{number}.png" for number in range(images)]
    texts = [text for number in markers for text in ("<image>" * number + "x", "y")]
    train = write([{"image": names or None, "conversations": turns(*texts)}])
    if fits:
        assert len(load_train_records(train)) == 1
    else:
        assert "record[0], field 'conversations'" in problems(load_train_records, train)[0]
    if len(markers) == 1:
        test = write([{"question_id": 1, "image": names or None, "text": texts[0], "answer": "y"}])
        if fits:
            assert len(load_question_records(test)) == 1
        else:
            assert "record[0], field 'text'" in problems(load_question_records, test)[0]


def test_a_marker_in_an_answer_or_a_dropped_turn(write):
    assert load_train_records(write([{"conversations": turns("<image>", "x", "y", first="gpt")}]))
    assert "<image>" in problems(load_train_records, write([{"conversations": turns("x", "an <image>")}]))[0]


def test_a_file_of_the_other_kind_is_told_once(write):
    train = {"id": 1, "image": "a.png", "conversations": turns("<image> x", "y")}
    path = write([train] * 120)
    said = "record[0], field 'conversations': this is a record to learn from, no question with its answer"
    assert problems(load_question_records, path) == (f"{path}: {said} (and 119 more like it)",)
    path = write([{"question_id": 1, "image": "a.png", "text": "x", "answer": "y"}] * 120)
    said = "record[0], field 'text': this is a question with its answer, no conversation to learn from"
    assert problems(load_train_records, path) == (f"{path}: {said} (and 119 more like it)",)


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
            "images": [{"id": "2", "file_name": "b.jpg"}, {"id": 1, "file_name": "a.jpg"}],
            "annotations": [
                {"id": 1, "image_id": "1", "caption": "one"},
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


@pytest.mark.parametrize("caption", ["", " ", "\n\t"])
def test_empty_captions_are_refused(caption, write):
    content = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": caption}] * 2}
    found = problems(load_caption_references, write(content))
    assert [problem.split(": ", 1)[1] for problem in found] == [
        f"annotations[{index}], field 'caption': is empty: take it out" for index in (0, 1)
    ]


@pytest.mark.parametrize("id_", ["", "01", "x", "1.0", 1.0, None, "²", "9" * 5000, -1.5])
def test_what_is_no_image_id(id_, write):
    content = {"images": [{"id": id_, "file_name": "a"}], "annotations": []}
    assert "images[0], field 'id'" in problems(load_caption_references, write(content))[0]


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
