"""Records in Parquet and Arrow files are those of the same rows in JSON, and so is what is said of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from llava_cl.data import load_question_records, load_train_records
from llava_cl.errors import InputError

TRAIN: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "x/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "é日本"}],
    },
    {"id": "b", "image": None, "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]},
]
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "image": ["a.png"], "text": "What?", "answer": "B", "more": 1.5},
    {"question_id": 2, "image": None, "text": "", "answer": "C", "more": None},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def write(rows: list[dict[str, Any]], file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix.lower() == ".parquet":
        parquet.write_table(table, file)
    else:
        make = pyarrow.ipc.new_stream if "stream" in file.name else pyarrow.ipc.new_file
        with make(file, table.schema) as stream:
            stream.write_table(table)
    return file


@pytest.mark.parametrize("name", ["t.parquet", "T.PARQUET", "stream.arrow", "file.arrow", "in [1]/*.parquet"])
def test_rows_are_those_of_json(name: str, tmp_path: Path) -> None:
    for load, rows in ((load_train_records, TRAIN), (load_question_records, QUESTIONS)):
        assert load(write(rows, tmp_path / name)) == load(write(rows, tmp_path / "t.json"))


def test_what_is_wrong_is_told_as_of_json(tmp_path: Path) -> None:
    wrong = [
        {"question_id": 1, "images": "a.png", "text": "<image>", "answer": "B"},
        {"question_id": 1, "images": "b.png", "text": "x", "answer": None},
    ]
    told = []
    for name in ("t.json", "t.parquet", "t.arrow"):
        with pytest.raises(InputError) as error:
            load_question_records(write(wrong, tmp_path / name))
        told.append([problem.removeprefix(f"{tmp_path / name}: ") for problem in error.value.problems])
    assert len(told[0]) == 3
    assert told[1] == told[2] == told[0]


@pytest.mark.parametrize("content", [None, b"", b"[]", b"PAR1", "cut", b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_what_is_no_table_is_one_message(content: Any, name: str, tmp_path: Path, capfd: Any) -> None:
    file = tmp_path / name
    if content == "cut":
        content = write(QUESTIONS, file).read_bytes()[:-40]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_question_records(file)
    (problem,) = error.value.problems
    assert problem.startswith(f"{file}: ")
    assert capfd.readouterr() == ("", "")
