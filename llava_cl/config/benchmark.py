"""What a benchmark file can say: tasks, probes, and where their files lie below the data root."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Strict, Tag, model_validator

from llava_cl.config.section import Many, Section
from llava_cl.errors import InputError
from llava_cl.parsing import shown

_LONGEST_PATH, _LONGEST_NAME = 1024, 255
_Path = TypeVar("_Path", str, Path)


def _usable(path: _Path) -> _Path:
    """A path that every system call takes; where one does not, Python raises other errors than for a missing file."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which no path can") from error
    if b"\0" in name:
        raise ValueError("holds a zero byte, which no path can")
    if len(name) > _LONGEST_PATH or max(map(len, name.split(b"/"))) > _LONGEST_NAME:
        raise ValueError(f"is too long for a path: {_LONGEST_PATH} bytes, {_LONGEST_NAME} between slashes, are allowed")
    return path


def _below(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{shown(path)} must be relative to data_root, and below it: without a leading '/' or '..'")
    return path


def _one_folder(name: str) -> str:
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{shown(name)} must be the name of a folder, without '/'")
    return name


_Name = Annotated[str, AfterValidator(_usable), AfterValidator(_below)]
_Folder = Annotated[str, AfterValidator(_usable), AfterValidator(_one_folder)]
Place = Annotated[Path, Strict(False), AfterValidator(_usable)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]


_TASK_PATHS = ("train", "test", "validation", "images", "references", "validation_references")
Part = Literal["train", "test", "validation"]


class _Task(Section):
    name: Label
    train: _Name | None = None
    test: _Name
    validation: _Name | None = None
    records: dict[Part, int] = Field({})

    def paths(self) -> dict[str, str]:
        """The paths below the data root that are given, by field."""
        return {field: getattr(self, field) for field in _TASK_PATHS if getattr(self, field, None) is not None}


class TaskConfig(_Task):
    """One task of instructions. File paths are relative to the data root.

    `suffix` is added to every question; `suffix_by_answer` replaces it where the reference answer is the key.
    `records` says how many records there should be (`{train: 40000, test: 3000}`); another number is only told.
    """

    images: _Name
    scorer: str
    references: _Name | None = None
    validation_references: _Name | None = None
    suffix: str = ""
    suffix_by_answer: dict[str, str] = Field({})


class ClassTaskConfig(_Task):
    """One task of image classes: `train` and `test` are folders with a folder of images for each class.

    `classes` lists class folders by name, or by their place among all of them in order (0 = the first; folders named by
    numbers are ordered as numbers), or is how many there are, where the task has all. A class is called as its folder
    is, with spaces for underscores, or as the file `names.json` beside the training folder says, or as `names` does.
    `template` makes a sentence of the name, which takes the place of `{}`, for a model that reads.
    """

    classes: Annotated[int, Field(ge=2)] | Annotated[Many[_Folder | int], Field(min_length=2)]
    names: dict[str, str] = Field({})
    template: str = "a photo of a {}."
    scorer: Literal["exact"] = "exact"

    @model_validator(mode="after")
    def _usable(self) -> ClassTaskConfig:
        if not isinstance(self.classes, int) and len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is listed twice")
        before, _, after = self.template.partition("{}")
        if len(before) + len(after) == len(self.template) or set("{}") & set(before + after):
            raise ValueError("template: {} must stand in it once, for the name of the class, and no other brace")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """The class folders' names, in the order of the labels.

        Raises:
            InputError: they are not known, because the training folder is not there.
        """
        if isinstance(self.classes, int) or not all(isinstance(name, str) for name in self.classes):
            raise InputError(f"benchmark task {self.name}: the folder of its classes, {self.train}, is missing.")
        return tuple(map(str, self.classes))

    def class_names(self) -> list[str]:
        """What the classes are called."""
        return [self.names.get(folder, folder.replace("_", " ")) for folder in self.folders]


def _kind(task: Any) -> str:
    classes = "classes" in task if isinstance(task, Mapping) else isinstance(task, ClassTaskConfig)
    return (ClassTaskConfig if classes else TaskConfig).__name__


AnyTask = Annotated[
    Annotated[TaskConfig, Tag(TaskConfig.__name__)] | Annotated[ClassTaskConfig, Tag(ClassTaskConfig.__name__)],
    Discriminator(_kind),
]


class BenchmarkConfig(Section):
    """A stream of tasks in the order in which they are learned, and probes that are only evaluated.

    After a stage the tasks of `evaluate` are evaluated: "all", each by itself; or those "seen" so far, where the model
    chooses among the classes of all of them (class-incremental learning).

    `aliases` names folders below the data root that are also published under another name; the one that is there is
    used.
    """

    name: str
    description: str = ""
    aliases: dict[_Name, _Name] = Field({})
    evaluate: Literal["all", "seen"] = "all"
    tasks: Many[AnyTask] = Field(min_length=1)
    probes: Many[AnyTask] = ()

    @property
    def evaluated(self) -> tuple[AnyTask, ...]:
        """The tasks and the probes."""
        return (*self.tasks, *self.probes)

    def evaluated_after(self, stage: int) -> tuple[AnyTask, ...]:
        """The tasks and probes that are evaluated after a stage; 0 is the untouched base."""
        return self.evaluated if self.evaluate == "all" else self.tasks[:stage]

    def with_each(self, change: Callable[[AnyTask], AnyTask]) -> BenchmarkConfig:
        """The benchmark with every task and probe changed."""
        changed = {part: tuple(map(change, getattr(self, part))) for part in ("tasks", "probes")}
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _distinct(self) -> BenchmarkConfig:
        names = [task.name for task in self.evaluated]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"task names must differ, doubled: {', '.join(doubled)}")
        untrained = [task.name for task in self.tasks if task.train is None]
        if untrained:
            raise ValueError(f"tasks without a train file: {', '.join(untrained)}")
        kinds = {type(task) for task in self.evaluated}
        if len(kinds) > 1:
            raise ValueError("tasks of instructions and tasks of classes cannot be mixed in one stream")
        if self.evaluate == "seen" and (kinds != {ClassTaskConfig} or self.probes):
            raise ValueError("evaluate: 'seen' is for tasks of classes, without probes")
        return self
