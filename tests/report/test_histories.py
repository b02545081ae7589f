"""Answers of chosen questions, read from files of predictions without parsing every line."""

from __future__ import annotations

from pathlib import Path

from llava_cl.report.histories import _answers
from llava_cl.store import write_jsonl


def test_answers_are_found_whatever_their_ids_look_like(tmp_path: Path) -> None:
    ids = [7, "8", "a b", 'say "a"', "back\\slash", "é", "19"]
    file = tmp_path / "T.jsonl"
    write_jsonl(file, ({"question_id": id_, "prompt": f"p{id_}", "text": f"t{id_}"} for id_ in ids))
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{ "text" : "other spaces", "prompt": "", "question_id":"by hand"}\n')
    wanted = [str(id_) for id_ in ids if id_ != "19"] + ["by hand", "missing"]
    found = _answers(file, wanted)
    assert found.keys() == {*wanted} - {"missing"}
    assert all(found[str(id_)] == {"prompt": f"p{id_}", "text": f"t{id_}"} for id_ in ids if id_ != "19")
    assert found["by hand"]["text"] == "other spaces"
