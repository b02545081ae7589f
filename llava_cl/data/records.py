"""Instruction files to checked records: training conversations, test questions, caption references."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cl.data.conversation import count_image_turns
from llava_cl.errors import InputError
from llava_cl.parsing import SURROGATE, parse_json, read_text, shown

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 20
"""Most problems of one file that are listed one by one; the rest are counted."""

RecordId = str | int


@dataclass(frozen=True)
class TrainRecord:
    """One training conversation.

    Attributes:
        id: the file's `id` or `question_id`, or the position in the file where it has none.
        images: paths relative to the image folder; empty for text only.
        conversations: turns `{"from", "value"}` as in the file, a leading gpt turn included.
    """

    id: RecordId
    images: tuple[str, ...]
    conversations: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class QuestionRecord:
    """One test question; `id` is unique within its file, also as text, by which its credit is stored."""

    id: RecordId
    images: tuple[str, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class CaptionReference:
    """The captions that one image is scored against."""

    file_name: str
    captions: tuple[str, ...]


def load_train_records(path: Path) -> list[TrainRecord]:
    """Read a training file: one JSON array of `{"id", "image", "conversations"}` in UTF-8.

    Raises:
        InputError: the file cannot be read, or records are wrong; lists up to `MAX_PROBLEMS` of them.
    """
    problems = _Problems(path)
    records = []
    unseen = 0
    for index, raw in enumerate(_read_array(path)):
        found = len(problems)
        record = _object(raw, index, problems)
        named = next((key for key in ("id", "question_id") if isinstance(record.get(key), str | int)), None)
        id_: Any = record[named] if named else index
        if named and (fault := _id_fault(id_)):
            problems.add(index, named, fault)
        images = _images(record, index, problems)
        turns = _conversations(record, index, problems)
        if len(problems) > found:
            continue
        marked = count_image_turns(turns)
        if images and marked > 1 and marked != len(images):
            problems.add(
                index, "conversations", f"{marked} turns show <image> but there are {len(images)} images: give one each"
            )
            continue
        unseen += bool(images) and marked == 0
        records.append(TrainRecord(id_, images, turns))
    problems.raise_any()
    if unseen:
        logger.warning("%s: %d records have an image but no turn with <image>; it is not used", path, unseen)
    return records


def load_question_records(path: Path) -> list[QuestionRecord]:
    """Read a test file: one JSON array of `{"question_id", "image", "text", "answer"}` in UTF-8.

    Raises:
        InputError: the file cannot be read, or records are wrong, or ids repeat; lists up to `MAX_PROBLEMS` of them.
    """
    problems = _Problems(path)
    records = []
    first_use: dict[str, int] = {}
    for index, raw in enumerate(_read_array(path)):
        record = _object(raw, index, problems)
        id_: Any = record.get("question_id")
        fault = _id_fault(id_)
        if fault:
            problems.add(index, "question_id", fault)
            id_ = index
        elif (name := str(id_)) in first_use:
            same = f"{shown(id_)} is that of record[{first_use[name]}] too"
            problems.add(index, "question_id", f"{same} (1 and '1' are the same): make ids unique")
        else:
            first_use[name] = index
        images = _images(record, index, problems)
        text = _text(record, "text", index, problems)
        answer = _text(record, "answer", index, problems)
        records.append(QuestionRecord(id_, images, text, answer))
    problems.raise_any()
    return records


def load_caption_references(path: Path) -> dict[int, CaptionReference]:
    """Read a COCO-style reference file: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Other keys, such as `categories`, are dropped.

    Returns:
        By image id, which is the question's position in the test file counted from 1, in the file's order.

    Raises:
        InputError: the file cannot be read, an image id repeats, or an image has no caption.
    """
    problems = _Problems(path)
    content = _read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise InputError(f"{path}: must be a JSON object with the lists 'images' and 'annotations'")
    names: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    places: dict[int, int] = {}
    for index, raw in enumerate(content["images"]):
        image = _object(raw, index, problems, "images")
        id_ = image.get("id")
        if isinstance(id_, bool) or not isinstance(id_, int) or id_ in names:
            problems.add(index, "id", f"{shown(id_)} is not an integer or is used twice", "images")
            continue
        names[id_] = _text(image, "file_name", index, problems, "images")
        captions[id_] = []
        places[id_] = index
    for index, raw in enumerate(content["annotations"]):
        annotation = _object(raw, index, problems, "annotations")
        caption = _text(annotation, "caption", index, problems, "annotations")
        image_id = annotation.get("image_id")
        if not isinstance(image_id, bool) and isinstance(image_id, int) and image_id in captions:
            captions[image_id].append(caption)
        else:
            problems.add(index, "image_id", f"{shown(image_id)} is the id of no image", "annotations")
    for id_, index in places.items():
        if not captions[id_]:
            what = f"image {shown(id_)} ({shown(names[id_])}) has no caption: get the complete file"
            problems.add(index, "id", what, "images")
    problems.raise_any()
    return {id_: CaptionReference(names[id_], tuple(captions[id_])) for id_ in names}


class _Problems:
    """What is wrong with one file, collected so that it can all be mended at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, index: int, field: str | None, what: str, part: str = "record") -> None:
        where = f"{self._path}: {part}[{index}]" + (f", field {field!r}" if field else "")
        self._found.append(f"{where}: {what}")

    def raise_any(self) -> None:
        if not self._found:
            return
        hidden = len(self._found) - MAX_PROBLEMS
        more = [f"{self._path}: and {hidden} more problems"] if hidden > 0 else []
        raise InputError(*self._found[:MAX_PROBLEMS], *more)


def _read_json(path: Path) -> Any:
    text = read_text(Path(path), "check the path in the configuration")
    return parse_json(text, str(path), hint="; the file may be cut short or hold one object per line, not an array")


def _read_array(path: Path) -> list[Any]:
    content = _read_json(path)
    if not isinstance(content, list):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, but must be an array of records")
    if not content:
        raise InputError(f"{path}: holds no records")
    return content


def _object(raw: Any, index: int, problems: _Problems, part: str = "record") -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    problems.add(index, None, f"is a {type(raw).__name__}, but must be an object", part)
    return {}


def _text(record: dict[str, Any], field: str, index: int, problems: _Problems, part: str = "record") -> str:
    value: Any = record.get(field)
    fault = _text_fault(value)
    if fault:
        problems.add(index, field, fault, part)
        return ""
    return value


def _id_fault(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "must be a string or an integer"
    return _text_fault(value) if isinstance(value, str) else None


def _text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {'missing' if value is None else 'a ' + type(value).__name__}, but must be a string"
    if SURROGATE.search(value):
        return "holds half of a surrogate pair, which is no character: mend the file's \\u escapes"
    return None


def _images(record: dict[str, Any], index: int, problems: _Problems) -> tuple[str, ...]:
    """Paths under `image`: a string, a list of strings, or absent (or null) for none."""
    value = record.get("image")
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        problems.add(index, "image", "must be a path or a list of paths; leave it out for text only")
        return ()
    if any(SURROGATE.search(path) or "\0" in path for path in paths):
        problems.add(index, "image", "holds what no path can: a zero byte or half of a surrogate pair")
        return ()
    return tuple(paths)


def _conversations(record: dict[str, Any], index: int, problems: _Problems) -> tuple[dict[str, str], ...]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        problems.add(index, "conversations", "must be a list of turns with at least one question")
        return ()
    found = len(problems)
    for position, turn in enumerate(turns):
        field = f"conversations[{position}]"
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
            problems.add(index, field, "must be an object whose 'from' is 'human' or 'gpt'")
            continue
        fault = _text_fault(turn.get("value"))
        if fault:
            problems.add(index, f"{field}.value", fault)
    if len(problems) > found:
        return ()
    _check_roles([turn["from"] for turn in turns], index, problems)
    if not any(turn["value"].split() for turn in turns):
        problems.add(index, "conversations", "there is no word in any turn: remove the record")
    return tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)


def _check_roles(roles: Sequence[str], index: int, problems: _Problems) -> None:
    """Turns alternate; a leading gpt turn is allowed, and dropped when the conversation is encoded."""
    if "human" not in roles:
        problems.add(index, "conversations", "has no human turn: give it a question")
    for position in range(1, len(roles)):
        if roles[position] == roles[position - 1]:
            problems.add(
                index,
                f"conversations[{position}].from",
                f"is {roles[position]!r} like the turn before it: roles must alternate",
            )
            return
