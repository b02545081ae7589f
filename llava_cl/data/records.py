"""Instruction files to checked records: training conversations, test questions, caption references."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cl.data.conversation import IMAGE_MARKER, image_markers
from llava_cl.data.tables import SUFFIXES, read_table
from llava_cl.errors import InputError
from llava_cl.parsing import SURROGATE, parse_json, read_text, shown

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 20
"""Most problems of one file that are listed one by one; the rest are counted."""

RecordId = str | int

_OTHER_NAMES = {
    "image": "(image|img|picture|pic|photo)s?(paths?|files?|filenames?|names?|urls?)?",
    "conversations": "conv|messages?|dialog(ue)?s?|turns?",
    "text": "questions?|query|prompts?|instructions?",
    "answer": "responses?|labels?|gt|(gt|groundtruth)(answer)?",
    "question_id": "qid|ids?",
}
"""Key of a record -> what it is often called elsewhere, in small letters without others between."""


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
    """Read a training file: one JSON array of `{"id", "image", "conversations"}` in UTF-8, or a table (`.parquet`).

    Raises:
        InputError: the file cannot be read, or records are wrong; lists up to `MAX_PROBLEMS` of them.
    """
    problems = _Problems(path)
    records = []
    seen = unseen = 0
    for index, raw in enumerate(_read_array(path)):
        if isinstance(raw, dict) and {"text", "answer"} <= raw.keys() and "conversations" not in raw:
            problems.add_alike(index, "text", "this is a question with its answer, no conversation to learn from")
            continue
        found = len(problems)
        record = _object(raw, index, problems, ("id", "image", "conversations"))
        named = next((key for key in ("id", "question_id") if isinstance(record.get(key), str | int)), None)
        id_: Any = record[named] if named else index
        if named and (fault := _id_fault(id_)):
            problems.add(index, named, fault)
        images = _images(record, index, problems)
        turns = _conversations(record, index, problems)
        if len(problems) > found:
            continue
        markers = image_markers(turns)
        if fault := _marker_fault(len(images), markers):
            problems.add(index, "conversations", fault)
        seen += bool(images) and any(markers)
        unseen += bool(images) and not any(markers)
        records.append(TrainRecord(id_, images, turns))
    if unseen and not seen:
        problems.add(0, "conversations", f"no turn of this file has {IMAGE_MARKER}, so that no image would be shown")
    problems.raise_any()
    if unseen:
        logger.warning("%s: %d records have an image but no turn with <image>; it is not used", path, unseen)
    return records


def load_question_records(path: Path) -> list[QuestionRecord]:
    """Read a test file: one JSON array of `{"question_id", "image", "text", "answer"}` in UTF-8, or a table.

    Raises:
        InputError: the file cannot be read, or records are wrong, or ids repeat; lists up to `MAX_PROBLEMS` of them.
    """
    problems = _Problems(path)
    records = []
    first_use: dict[str, int] = {}
    for index, raw in enumerate(_read_array(path)):
        if isinstance(raw, dict) and "conversations" in raw and "text" not in raw:
            problems.add_alike(index, "conversations", "this is a record to learn from, no question with its answer")
            continue
        record = _object(raw, index, problems, ("question_id", "image", "text", "answer"))
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
        if fault := _marker_fault(len(images), [text.count(IMAGE_MARKER)]):
            problems.add(index, "text", fault)
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
        image = _object(raw, index, problems, ("id", "file_name"), "images")
        id_ = _number(image.get("id"))
        if id_ is None or id_ in names:
            problems.add(index, "id", f"{shown(image.get('id'))} is not an integer or is used twice", "images")
            continue
        names[id_] = _text(image, "file_name", index, problems, "images")
        captions[id_] = []
        places[id_] = index
    for index, raw in enumerate(content["annotations"]):
        annotation = _object(raw, index, problems, ("image_id", "caption"), "annotations")
        found = len(problems)
        caption = _text(annotation, "caption", index, problems, "annotations")
        if not caption.strip() and len(problems) == found:
            problems.add(index, "caption", "is empty: take it out", "annotations")
        image_id = _number(named := annotation.get("image_id"))
        if image_id in captions:
            captions[image_id].append(caption)
        else:
            problems.add(index, "image_id", f"{shown(named)} is the id of no image", "annotations")
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
        self._alike: dict[tuple[str, str], tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, index: int, field: str | None, what: str, part: str = "record") -> None:
        where = f"{self._path}: {part}[{index}]" + (f", field {shown(field)}" if field else "")
        self._found.append(f"{where}: {what}")

    def add_alike(self, index: int, field: str, what: str, part: str = "record") -> None:
        """What all records of a file may have: told of the first that has it, and counted."""
        place, others = self._alike.setdefault((field, what), (len(self._found), -1))
        self._alike[field, what] = place, others + 1
        if others < 0:
            self.add(index, field, what, part)

    def raise_any(self) -> None:
        if not self._found:
            return
        for place, others in self._alike.values():
            self._found[place] += f" (and {others} more like it)" if others else ""
        hidden = len(self._found) - MAX_PROBLEMS
        more = [f"{self._path}: and {hidden} more problems"] if hidden > 0 else []
        raise InputError(*self._found[:MAX_PROBLEMS], *more)


def _read_json(path: Path) -> Any:
    text = read_text(Path(path), "check the path in the configuration")
    return parse_json(text, str(path), hint="; the file may be cut short or hold one object per line, not an array")


def _read_array(path: Path) -> list[Any]:
    content = read_table(path) if path.suffix.lower() in SUFFIXES else _read_json(path)
    if not isinstance(content, list):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, but must be an array of records")
    if not content:
        raise InputError(f"{path}: holds no records")
    return content


def _object(raw: Any, index: int, problems: _Problems, known: tuple[str, ...], part: str = "record") -> dict[str, Any]:
    """The object, with what is in a key that is nearly a missing one of `known` under that, and told of."""
    if not isinstance(raw, dict):
        problems.add(index, None, f"is a {type(raw).__name__}, but must be an object", part)
        return {}
    renamed = {}
    for name in known:
        if raw.get(name) is None:
            near = [key for key, value in raw.items() if value and key not in known and _is_near(key, name)]
            if near:
                problems.add_alike(index, near[0], f"is not known and {name!r} is missing: call it so", part)
                renamed[name] = raw[near[0]]
    return {**raw, **renamed} if renamed else raw


@functools.lru_cache(maxsize=1024)
def _is_near(key: str, name: str) -> bool:
    """Whether a key that is not known may have been meant for one that is."""
    key, plain = (re.sub("[^a-z]|s$", "", text.lower()) for text in (key, name))
    if key == plain or re.fullmatch(_OTHER_NAMES.get(name, name), key):
        return True
    mistyped = len(plain) > 3 and abs(len(key) - len(plain)) < 2
    return mistyped and difflib.SequenceMatcher(None, key, plain).ratio() >= 0.8


def _number(value: Any) -> int | None:
    """An image id: an integer, also as text."""
    if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,17}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


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


def _marker_fault(images: int, markers: Sequence[int]) -> str | None:
    """What is wrong with the number of markers in each text of a record, given the number of its images."""
    total, texts = sum(markers), sum(map(bool, markers))
    if not images and total:
        return f"has {IMAGE_MARKER}, but 'image' is missing: give the file's path there, or take {IMAGE_MARKER} out"
    if total in (0, 1) or (total == images and texts in (1, images)):
        return None
    return (
        f"{IMAGE_MARKER} stands {total} times, in {texts} turns, but there are {images} images: one for each, in one "
        "turn or each in its own, or a single one for all"
    )


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
