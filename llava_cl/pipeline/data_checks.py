"""What can be found wrong with a run's data: every record and every image of every task."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cl.config import AnyTask, ClassTaskConfig, Part, RunConfig, TaskConfig
from llava_cl.data import (
    ConversationDataset,
    QuestionRecord,
    TrainRecord,
    check_image,
    load_caption_references,
    load_class_records,
    load_question_records,
    load_train_records,
    measurement_indices,
)
from llava_cl.errors import InputError, problems_of
from llava_cl.evaluation.scorers import reference_problems, unearned
from llava_cl.pipeline.conversations import Conversations
from llava_cl.pipeline.task_data import evaluation_files

logger = logging.getLogger(__name__)

_LISTED = 20

Progress = Callable[[str, int, int], None]
"""Called with a task, the number of its images that are checked, and of all."""


@dataclass(frozen=True)
class TaskData:
    """What a task's data holds: the records of each file (path below the data root), and different images."""

    task: AnyTask
    records: dict[str, int]
    images: int

    def unexpected(self) -> list[str]:
        """Numbers of records that are not those the benchmark states."""
        task = self.task
        files: dict[Part, str | None] = {"train": task.train, "test": task.test, "validation": task.validation}
        return [
            f"{name}: {self.records[name]} records, {task.records[part]} are expected"
            for part, name in files.items()
            if name is not None and self.records[name] != task.records.get(part, self.records[name])
        ]


def check_records(config: RunConfig, progress: Progress = lambda task, done, total: None) -> list[TaskData]:
    """Reads every record and every image of every task and checks fields, ids, images and label masks.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = _Check(config, pool, progress, problems)
        found = [
            check.classes(task) if isinstance(task, ClassTaskConfig) else check.instructions(task)
            for task in config.benchmark.evaluated
        ]
    if problems:
        raise InputError(*problems)
    return found


class _Check:
    """Checks tasks one after the other and collects what is wrong with them in `problems`."""

    def __init__(self, config: RunConfig, pool: ThreadPoolExecutor, progress: Progress, problems: list[str]) -> None:
        self._config = config
        self._root = config.data_root
        self._pool = pool
        self._progress = progress
        self._problems = problems

    def instructions(self, task: TaskConfig) -> TaskData:
        """Checks a task's files of records, its images and its label masks."""
        self._progress(task.name, 0, 0)
        train: list[TrainRecord] = []
        files: dict[str, Sequence[TrainRecord | QuestionRecord]] = {}
        if task.train is not None:
            files[task.train] = train = self._read(load_train_records, self._root / task.train)
        for name, references in ((task.test, task.references), (task.validation, task.validation_references)):
            if name is not None:
                files[name] = questions = self._read(load_question_records, self._root / name)
                captions = self._read(load_caption_references, self._root / references) if references else None
                if questions and (captions or not references):
                    unmatched = reference_problems(task.scorer, questions, captions)
                    wrong, told = ([], []) if unmatched else unearned(task.scorer, questions, captions)
                    self._problems += (f"{self._root / name}: {problem}" for problem in (*unmatched, *wrong))
                    for note in told:
                        logger.warning("%s: %s", self._root / name, note)
                if questions and name == evaluation_files(task, self._config.evaluation)[0]:
                    too_long = problems_of(functools.partial(self._conversations.check_lengths, task, questions))
                    self._problems += (f"{self._root / name}: {problem}" for problem in too_long)
        paths = list(dict.fromkeys(path for records in files.values() for record in records for path in record.images))
        # Other threads decode images while this one computes masks.
        decoding = self._decoding(self._root / task.images, paths)
        if train:
            self._measurable(len(train))
            self._problems += self._unusable(task, train)
        broken = self._broken(task, paths, decoding)
        for name, records in files.items():
            self._problems += _listed(
                self._root / name,
                [
                    f"record {index} (id {record.id}), field image: {broken[path]}"
                    for index, record in enumerate(records)
                    for path in record.images
                    if path in broken
                ],
            )
        return TaskData(task, {name: len(records) for name, records in files.items()}, len(paths))

    def classes(self, task: ClassTaskConfig) -> TaskData:
        """Checks that every class has its folder with images in every split, and the images."""
        self._progress(task.name, 0, 0)
        counts: dict[str, int] = {}
        for name in task.paths().values():
            folder = self._root / name
            records = self._read(functools.partial(load_class_records, classes=task.folders), folder)
            counts[name] = len(records)
            if name == task.train and records:
                self._measurable(len(records))
            paths = [f"{name}/{record.id}" for record in records]
            broken = self._broken(task, paths, self._decoding(self._root, paths))
            self._problems += _listed(folder, list(broken.values()))
        return TaskData(task, counts, sum(counts.values()))

    def _read(self, load: Callable[[Path], Any], file: Path) -> Any:
        """What `load` reads, or nothing where there are problems."""
        try:
            return load(file)
        except InputError as error:
            self._problems += error.problems
            return []

    def _measurable(self, records: int) -> None:
        self._problems += problems_of(lambda: measurement_indices(records, self._config.measurement.ratio))

    def _decoding(self, folder: Path, paths: Sequence[str]) -> Iterator[str | None]:
        return self._pool.map(lambda path: next(problems_of(lambda: check_image(path, folder)), None), paths)

    def _broken(self, task: AnyTask, paths: Sequence[str], decoding: Iterator[str | None]) -> dict[str, str]:
        """Path -> problem of the images that cannot be used."""
        broken: dict[str, str] = {}
        for done, (path, problem) in enumerate(zip(paths, decoding, strict=True), start=1):
            if problem is not None:
                broken[path] = problem
            self._progress(task.name, done, len(paths))
        return broken

    def _unusable(self, task: TaskConfig, records: list[TrainRecord]) -> list[str]:
        config = self._config
        dataset = ConversationDataset(
            records, self._root / task.images, self._conversations.chat, max_length=config.training.max_length
        )
        unusable = dataset.audit()
        listed = "; ".join(f"record {item.index} (id {item.id}): {item.reason}" for item in unusable[:_LISTED])
        if len(unusable) <= config.unmatched_limit * len(records):
            if unusable:
                logger.warning("%s: %d samples teach nothing: %s", task.name, len(unusable), listed)
            return []
        return [
            f"{self._root / str(task.train)}: {len(unusable)} of {len(records)} samples teach nothing, more than the "
            f"share unmatched_limit = {config.unmatched_limit:g} allows: {listed}. Correct them, or raise the limit."
        ]

    @functools.cached_property
    def _conversations(self) -> Conversations:
        return Conversations(self._config)


def _listed(place: Path, problems: list[str]) -> list[str]:
    """The first problems of a file or folder, and how many more there are."""
    more = [f"{place}: {len(problems) - _LISTED} more images are missing or refused."] if problems[_LISTED:] else []
    return [*(f"{place}: {problem}" for problem in problems[:_LISTED]), *more]
