"""Everything that can be found wrong before a run spends anything: files, records, images, masks, ranks, disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llava_cl.config import RunConfig, TaskConfig
from llava_cl.data import (
    ConversationDataset,
    GlobalBatchSampler,
    QuestionRecord,
    TrainRecord,
    load_caption_references,
    load_question_records,
    load_train_records,
    resolve_image,
)
from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS
from llava_cl.methods import build_method
from llava_cl.models import ModelFamily, family

_LISTED = 20


def data_files(config: RunConfig) -> list[Path]:
    """Every JSON file that the run reads."""
    names = {
        name
        for task in (*config.benchmark.tasks, *config.benchmark.probes)
        for name in (task.train, task.test, task.validation, task.references, task.validation_references)
        if name is not None
    }
    return sorted(config.data_root / name for name in names)


def check_setup(config: RunConfig, ranks: int) -> None:
    """Checks method, model, ranks, scorers and files, without reading the records.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems = list(_collect(lambda: build_method(config.method), lambda: family(config.model)))
    training = config.training
    problems += _collect(lambda: GlobalBatchSampler([1], training.global_batch, training.micro_batch, 0, ranks, 0))
    for task in (*config.benchmark.tasks, *config.benchmark.probes):
        scorer = SCORERS.get(task.scorer)
        if scorer is None:
            problems.append(f"benchmark task {task.name}: scorer '{task.scorer}' is none of {', '.join(SCORERS)}.")
        else:
            problems += (f"benchmark task {task.name}: {problem}" for problem in _collect(scorer.check))
        if not (config.data_root / task.images).is_dir():
            problems.append(f"benchmark task {task.name}: image folder {config.data_root / task.images} is missing.")
    problems += [f"{file}: is missing." for file in data_files(config) if not file.is_file()]
    if problems:
        raise InputError(*problems)


def check_records(config: RunConfig, progress: Callable[[str], None] = lambda name: None) -> None:
    """Reads every record of every task and checks fields, ids, images and label masks.

    Raises:
        InputError: everything that is wrong, at once.
    """
    models = family(config.model)
    problems: list[str] = []
    for task in (*config.benchmark.tasks, *config.benchmark.probes):
        progress(task.name)
        problems += _check_task(config, task, models)
    if problems:
        raise InputError(*problems)


def check_disk(config: RunConfig, folder: Path) -> None:
    """Checks that the run's files fit on the disk of `folder`.

    Raises:
        InputError: too little space is free.
    """
    need = required_bytes(config)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise InputError(
            f"{folder}: the run needs up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space or give another --output."
        )


def required_bytes(config: RunConfig) -> int:
    """Upper bound of the bytes that the run stores: adapters and their start per stage, full bases once."""
    models = family(config.model)
    skeleton = models.skeleton()
    shapes = [tuple(target.module.weight.shape) for target in models.linear_targets(skeleton).values()]
    adapters = sum(4 * config.lora.rank * (rows + columns) for rows, columns in shapes)
    bases = sum(4 * columns * columns for _, columns in shapes)
    return 2 * adapters * len(config.benchmark.tasks) + bases


def _collect(*checks: Callable[[], object]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except InputError as error:
            yield from error.problems


def _check_task(config: RunConfig, task: TaskConfig, models: ModelFamily) -> list[str]:
    root = config.data_root
    problems: list[str] = []
    train: list[TrainRecord] = []
    questions: list[QuestionRecord] = []

    def read_train() -> None:
        if task.train is not None:
            train.extend(load_train_records(root / task.train))

    def read_questions() -> None:
        for name in (task.test, task.validation):
            if name is not None:
                questions.extend(load_question_records(root / name))

    def read_references() -> None:
        for name in (task.references, task.validation_references):
            if name is not None:
                load_caption_references(root / name)

    problems += _collect(read_train, read_questions, read_references)
    problems += _missing_images(task, root / task.images, [*train, *questions])
    if train:
        problems += _unusable(config, task, train, models)
    return problems


def _missing_images(task: TaskConfig, root: Path, records: Sequence[TrainRecord | QuestionRecord]) -> list[str]:
    problems = []
    for path, id_ in {path: record.id for record in records for path in record.images}.items():
        try:
            resolve_image(path, root)
        except InputError as error:
            problems.append(f"task {task.name}, record {id_}, field image: {error}")
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"task {task.name}: {len(problems) - _LISTED} more images are missing or refused."]
    return problems


def _unusable(config: RunConfig, task: TaskConfig, records: list[TrainRecord], models: ModelFamily) -> list[str]:
    images = models.image_spec()
    dataset = ConversationDataset(
        records,
        config.data_root / task.images,
        models.tokenizer(),
        image_token_id=images.token_id,
        num_image_tokens=images.tokens,
        max_length=config.training.max_length,
    )
    unusable = dataset.audit()
    if len(unusable) <= config.unmatched_limit * len(records):
        return []
    listed = "; ".join(f"record {item.index} (id {item.id}): {item.reason}" for item in unusable[:_LISTED])
    return [
        f"{config.data_root / str(task.train)}: {len(unusable)} of {len(records)} samples teach nothing, more than "
        f"the share unmatched_limit = {config.unmatched_limit:g} allows: {listed}. Correct them, or raise the limit."
    ]
