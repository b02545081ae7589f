"""Where the data of a run's tasks lie, their fingerprint, and the questions that are evaluated; no model is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava_cl.config import AnyTask, ClassTaskConfig, EvaluationConfig, RunConfig, TaskConfig
from llava_cl.data import QuestionRecord, TrainRecord, load_class_records, load_question_records, load_train_records
from llava_cl.store.fingerprint import fingerprint_files, fingerprint_pictures

_IMAGE_FIELDS = {TaskConfig: ("images",), ClassTaskConfig: ("train", "test", "validation")}


def data_files(config: RunConfig) -> list[Path]:
    """Every JSON file that the run reads."""
    return _paths(config, folders=False)


def image_folders(config: RunConfig) -> list[Path]:
    """Every folder of images that the run reads from."""
    return _paths(config, folders=True)


def _paths(config: RunConfig, *, folders: bool) -> list[Path]:
    names = {
        name
        for task in config.benchmark.evaluated
        for field, name in task.paths().items()
        if (field in _IMAGE_FIELDS[type(task)]) == folders
    }
    return sorted(config.data_root / name for name in names)


def fingerprint_data(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each JSON file, of each task's pictures (see `fingerprint_pictures`), and of the names of classes'.

    Raises:
        InputError: what is missing.
    """
    found = fingerprint_files(data_files(config), config.data_root)
    for task in config.benchmark.evaluated:
        if isinstance(task, ClassTaskConfig):
            for name in task.paths().values():
                found[f"{task.name}: {name}"] = _listing(config.data_root / name, task.folders)
        found[f"{task.name}: pictures"] = fingerprint_pictures(_pictures(config, task))
    return found


def _pictures(config: RunConfig, task: AnyTask) -> dict[str, Path]:
    """The pictures that a task's records name, or that are in its class folders, of every split; by path."""
    root, splits = config.data_root, [name for name in (task.train, task.test, task.validation) if name is not None]
    if isinstance(task, ClassTaskConfig):
        names = [
            f"{split}/{record.id}" for split in splits for record in load_class_records(root / split, task.folders)
        ]
    else:
        records: list[TrainRecord | QuestionRecord] = [*load_train_records(root / task.train)] if task.train else []
        for split in splits[bool(task.train) :]:
            records += load_question_records(root / split)
        names = [f"{task.images}/{image}" for record in records for image in record.images]
    return {name: root / name for name in names}


def _listing(folder: Path, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for record in load_class_records(folder, classes):
        digest.update(f"{record.id}\0{(folder / record.id).stat().st_size}\n".encode())
    return digest.hexdigest()


def evaluation_folder(task: ClassTaskConfig, evaluation: EvaluationConfig) -> str:
    """The folder of the split that is evaluated; a task without validation has its test split."""
    return task.validation if evaluation.split == "validation" and task.validation is not None else task.test


def picture_places(config: RunConfig, task: AnyTask, question: QuestionRecord) -> list[tuple[str, Path]]:
    """The pictures of an evaluated question, each as a path and the folder that it must not leave."""
    if isinstance(task, TaskConfig):
        return [(image, config.data_root / task.images) for image in question.images]
    folder = evaluation_folder(task, config.evaluation)
    return [(f"{folder}/{image}", config.data_root) for image in question.images]


def evaluation_files(task: TaskConfig, evaluation: EvaluationConfig) -> tuple[str, str | None]:
    """Question and reference file of the split that is evaluated; a task without validation has its test split."""
    if evaluation.split == "validation" and task.validation is not None:
        return task.validation, task.validation_references
    return task.test, task.references


def read_questions(config: RunConfig, task: AnyTask) -> list[QuestionRecord]:
    """The questions of a task in the split that is evaluated; those of classes have the class's name as answer."""
    if isinstance(task, TaskConfig):
        return load_question_records(config.data_root / evaluation_files(task, config.evaluation)[0])
    folder = config.data_root / evaluation_folder(task, config.evaluation)
    return [
        QuestionRecord(record.id, (record.id,), "", task.folders[record.label])
        for record in load_class_records(folder, task.folders)
    ]
