"""13,500 damaged files of records and 5,500 of answers: accepted as a second reading of the rules says, or refused.

A refusal names the file, and the record and field where the file is a list of records.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_cl import cli
from llava_cl.config import TaskConfig
from llava_cl.data import load_caption_references, load_question_records, load_train_records
from llava_cl.errors import InputError
from llava_cl.pipeline.scoring import score_files
from mutations import damage, fuzz, json_text, mutate

TRAIN = [
    {
        "id": "a",
        "image": "x/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "é"}],
    },
    {
        "question_id": 7,
        "image": ["1.jpg", "2.jpg"],
        "conversations": [
            {"from": "human", "value": "<image> 1"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "<image> 2"},
            {"from": "gpt", "value": ""},
        ],
    },
    {
        "conversations": [
            {"from": "gpt", "value": "hello"},
            {"from": "human", "value": "x"},
            {"from": "gpt", "value": "y"},
        ]
    },
]
QUESTIONS = [
    {"question_id": "q", "image": "a.png", "text": "What?", "answer": "B"},
    {"question_id": 0, "text": "", "answer": ""},
    {"question_id": "1", "image": ["a.png", "b.png"], "text": "<image>", "answer": "1"},
]
CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 1, "caption": "one"},
        {"image_id": 2, "caption": "two"},
        {"image_id": 1, "caption": "uno"},
    ],
}
ANSWERS = [
    {"question_id": "q", "text": "B"},
    {"question_id": 0, "text": ""},
    {"question_id": "1", "text": "é", "more": 1},
]
RECORD = re.compile(r"(record|images|annotations)\[\d+\](, field '[^']{1,60}')?: \S")


def text(value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)


def number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def whole(value: Any) -> bool:
    return type(value) is int


def images(record: dict[str, Any]) -> bool:
    value = record.get("image")
    paths = value if isinstance(value, list) else [value]
    return value is None or (bool(paths) and all(text(path) and path and "\0" not in path for path in paths))


def misnamed(record: dict[str, Any], *names: str) -> bool:
    """Whether a key that is missing is there in other letters, of which all but one are the same in the same order."""
    return any(
        value and key not in names and like(re.sub("[^a-z]|s$", "", key.lower()), name)
        for name in names
        if record.get(name) is None
        for key, value in record.items()
    )


def like(key: str, name: str) -> bool:
    longer = max(len(key), len(name))
    if name == "id" or longer > len(name) + 1:
        return key == name
    lengths = [[0] * (len(name) + 1) for _ in range(len(key) + 1)]
    for i, letter in enumerate(key):
        for j, other in enumerate(name):
            same = lengths[i][j] + 1 if letter == other else 0
            lengths[i + 1][j + 1] = max(same, lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1] >= longer - 1


def train_record(record: Any) -> bool:
    if not isinstance(record, dict) or not images(record) or misnamed(record, "id", "image"):
        return False
    named = [record[key] for key in ("id", "question_id") if isinstance(record.get(key), bool | str | int)]
    if named and not (whole(named[0]) or text(named[0])):
        return False
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and text(turn.get("value")) for turn in turns):
        return False
    roles = [turn.get("from") for turn in turns]
    if any(role != ("human", "gpt")[(at + (roles[0] == "gpt")) % 2] for at, role in enumerate(roles)):
        return False
    return "human" in roles and any(turn["value"].split() for turn in turns) and marked(record, *markers(record))


def markers(record: dict[str, Any]) -> list[int]:
    turns = record["conversations"]
    return [turn["value"].count("<image>") for turn in turns[turns[0]["from"] == "gpt" :]]


def marked(record: dict[str, Any], *found: int) -> bool:
    """Whether the number of markers in each text fits that of the images."""
    shown = record.get("image")
    images = 0 if shown is None else 1 if isinstance(shown, str) else len(shown)
    if sum(found) == 0:
        return True
    texts = [number for number in found if number]
    together = len(texts) == 1 and texts[0] in (1, images)
    return images > 0 and (together or texts == [1] * images)


def question_record(record: Any) -> bool:
    if not isinstance(record, dict) or not images(record):
        return False
    id_ = record.get("question_id")
    if misnamed(record, "image") or not text(record.get("text")) or not marked(record, record["text"].count("<image>")):
        return False
    return (whole(id_) or text(id_)) and text(record.get("text")) and text(record.get("answer"))


def train_file(content: Any) -> bool:
    if not isinstance(content, list) or not content or not all(map(train_record, content)):
        return False
    shown = [sum(markers(record)) for record in content if record.get("image") is not None]
    return not shown or any(shown)


def question_file(content: Any) -> bool:
    if not isinstance(content, list) or not content or not all(map(question_record, content)):
        return False
    return len({str(record["question_id"]) for record in content}) == len(content)


def caption_file(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    shown, said = content.get("images"), content.get("annotations")
    if not (
        isinstance(shown, list) and isinstance(said, list) and all(isinstance(item, dict) for item in shown + said)
    ):
        return False
    ids = [number(item.get("id")) for item in shown]
    named = [number(item.get("image_id")) for item in said]
    sound = all(map(whole, ids + named)) and len(set(ids)) == len(ids) and set(named) == set(ids)
    return (
        sound
        and all(text(item.get("file_name")) for item in shown)
        and all(text(item.get("caption")) and item["caption"].strip() for item in said)
    )


def parsed(content: bytes) -> Any:
    """The JSON value, or NotImplemented where there is none."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return NotImplemented


def from_json(good: Any, damaged: float = 0.25) -> Callable[[random.Random], bytes]:
    def make(choice: random.Random) -> bytes:
        whole_file = choice.random() > damaged
        value = mutate(good, choice, choice.randrange(whole_file, 4))
        content = json_text(value, choice).encode("utf-8", "surrogatepass")
        return content if whole_file else damage(content, choice)

    return make


def problems_of_file(read: Callable[[], Any], file: Path) -> tuple[str, ...]:
    """What a reader says is wrong, each short and naming the file."""
    try:
        read()
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.startswith(f"{file}: "), problem[:300]
            assert len(problem) < len(str(file)) + 1500, problem[:300]
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("load", "good", "valid"),
    [
        (load_train_records, TRAIN, train_file),
        (load_question_records, QUESTIONS, question_file),
        (load_caption_references, CAPTIONS, caption_file),
    ],
    ids=["train", "questions", "captions"],
)
def test_files_of_records(load: Callable[[Path], Any], good: Any, valid: Callable[[Any], bool], tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    counts = [0, 0]

    def check(content: bytes) -> None:
        file.write_bytes(content)
        problems = problems_of_file(lambda: load(file), file)
        value = parsed(content)
        right = value is not NotImplemented and valid(value)
        counts[right] += 1
        assert bool(problems) is not right, (problems, value)
        lists = value if isinstance(value, list) else value.get("images") if isinstance(value, dict) else None
        if isinstance(lists, list) and (
            lists if valid is not caption_file else isinstance(value.get("annotations"), list)
        ):
            for problem in problems[:20]:
                assert RECORD.match(problem.removeprefix(f"{file}: ")), problem[:300]

    check(json.dumps(good).encode())
    assert counts == [0, 1]
    fuzz(4500, from_json(good), check)
    assert min(counts) > sum(counts) / 20, counts


def test_files_of_answers(tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.json", tmp_path / "answers.jsonl"
    questions.write_text(json.dumps(QUESTIONS))
    task = TaskConfig(name="T", train="t", test="q", images="i", scorer="exact")
    wanted = [record["question_id"] for record in QUESTIONS]
    counts = [0, 0]

    def make(choice: random.Random) -> bytes:
        rows = mutate(ANSWERS, choice, choice.randrange(1, 5))
        lines = (
            [json_text(row, random.Random(0)) for row in rows] if isinstance(rows, list) else [json_text(rows, choice)]
        )
        content = "".join(line.replace("\n", " ") + "\n" for line in lines).encode("utf-8", "surrogatepass")
        return damage(content, choice) if choice.random() < 0.25 else content

    def check(content: bytes) -> None:
        answers.write_bytes(content)
        lines = content.split(b"\n")
        while lines and not lines[-1].strip(b" \t\r"):
            lines.pop()
        rows = [parsed(line) for line in lines]
        right = all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows)
        right = right and all(type(row.get("question_id")) in (str, int) for row in rows)
        right = right and sorted(str(row["question_id"]) for row in rows) == sorted(map(str, wanted))
        counts[right] += 1
        problems = problems_of_file(lambda: score_files(task, questions, answers, None), answers)
        assert bool(problems) is not right, (problems, rows)

    fuzz(5500, make, check)
    assert min(counts) > sum(counts) / 20, counts


def test_the_command_says_it_with_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, answers = tmp_path / "questions.json", tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    benchmark = tmp_path / "stream.yaml"
    benchmark.write_text("name: s\ntasks:\n  - {name: T, train: t, test: q, images: i, scorer: exact}\n")
    files = ["--questions", str(questions), "--answers", str(answers)]
    monkeypatch.setattr("sys.argv", ["llava-cl", "score", "--benchmark", str(benchmark), "--task", "T", *files])
    codes = []
    for seed in range(40):
        content = from_json(QUESTIONS)(random.Random(seed))
        questions.write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        message = capsys.readouterr().err
        codes.append(exit_.value.code or 0)
        assert codes[-1] in (0, 2), message
        if codes[-1]:
            assert str(tmp_path) in message and "Traceback" not in message
            assert message.rstrip("\n").replace("\n", "").isprintable()
    assert codes.count(2) > 15 and codes.count(0) > 3
