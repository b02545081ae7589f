"""Test questions as the page shows them: picture, reference answer, and names of classes in place of their folders."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_cl.config import AnyTask, ClassTaskConfig, RunConfig, validate_config
from llava_cl.data import load_thumbnail
from llava_cl.errors import InputError
from llava_cl.pipeline.task_data import picture_places, read_questions
from llava_cl.report.load import RunRecord

SIDE = 208
"""Pixels of a picture's longer side, twice what the page gives it."""
MOST_BYTES = 12_000
"""Of one picture; a better quality is given up for it."""
_QUALITIES = (80, 60, 40, 20)


@dataclass(frozen=True)
class Picture:
    """A small picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Question:
    """What the data say of a question; `pictures` is how many it has, `picture` the first where it can be read."""

    reference: str
    pictures: int
    picture: Picture | None


class Questions:
    """Looks up the questions of a run where its data are; `problem` says why, where they cannot be read."""

    def __init__(self, record: RunRecord) -> None:
        self.problem: str | None = None
        self._config: RunConfig | None = None
        try:
            self._config = validate_config(record.run.config, str(record.directory / "run.json"))
        except InputError as error:
            self.problem = error.problems[0]

    def find(self, task: str, ids: Sequence[str]) -> dict[str, Question]:
        """The questions of a task by id; none where the data cannot be read."""
        config = next((known for known in self._evaluated if known.name == task), None)
        if self._config is None or config is None:
            return {}
        try:
            records = {str(record.id): record for record in read_questions(self._config, config)}
        except InputError as error:
            self.problem = self.problem or error.problems[0]
            return {}
        names = self.class_names(task)
        found = {}
        for record in (records[id_] for id_ in ids if id_ in records):
            pictures = picture_places(self._config, config, record)
            reference = names.get(record.answer, record.answer)
            found[str(record.id)] = Question(reference, len(pictures), self._first(pictures))
        return found

    def class_names(self, task: str) -> dict[str, str]:
        """What the class folders that a task's answers name are called; its own, then those of the other tasks."""
        found: dict[str, str] = {}
        for other in sorted(self._evaluated, key=lambda other: other.name == task):
            if isinstance(other, ClassTaskConfig):
                with contextlib.suppress(InputError):  # its folders are not there, so their names are not known
                    found |= dict(zip(other.folders, other.class_names(), strict=True))
        return found

    @property
    def _evaluated(self) -> Sequence[AnyTask]:
        return self._config.benchmark.evaluated if self._config else ()

    def _first(self, pictures: Sequence[tuple[str, Path]]) -> Picture | None:
        if not pictures:
            return None
        try:
            return small_picture(*pictures[0])
        except InputError as error:
            self.problem = self.problem or error.problems[0]
            return None


def small_picture(path: str, folder: Path) -> Picture:
    """An image file, made small and encoded anew as JPEG.

    Raises:
        InputError: the file is missing, outside the folder, or cannot be decoded.
    """
    image = load_thumbnail(path, folder, SIDE)
    for quality in _QUALITIES:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= MOST_BYTES:
            break
    uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(uri, *image.size)
