"""Everything that can be found wrong before a run spends anything: files, records, images, masks, ranks, disk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from llava_cl.config import Part, RunConfig, TaskConfig
from llava_cl.data import (
    ChatFormat,
    ConversationDataset,
    QuestionRecord,
    TrainRecord,
    chat_format,
    check_image,
    load_caption_references,
    load_question_records,
    load_train_records,
    measurement_indices,
)
from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS, reference_problems
from llava_cl.methods import build_method
from llava_cl.models import family
from llava_cl.pipeline.scoring import evaluation_files, task_scorer

logger = logging.getLogger(__name__)

_LISTED = 20

Progress = Callable[[str, int, int], None]
"""Called with a task, the number of its images that are checked, and of all."""


@dataclass(frozen=True)
class TaskData:
    """What a task's data holds: the records of each file (path below the data root), and different images."""

    task: TaskConfig
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


def data_files(config: RunConfig) -> list[Path]:
    """Every JSON file that the run reads."""
    names = {
        name
        for task in config.benchmark.evaluated
        for name in (task.train, task.test, task.validation, task.references, task.validation_references)
        if name is not None
    }
    return sorted(config.data_root / name for name in names)


def check_plan(config: RunConfig, ranks: int) -> None:
    """Checks what needs neither model nor data: method, number of ranks, scorers.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems = list(_collect(lambda: build_method(config.method), lambda: config.training.micro_batch_for(ranks)))
    if (
        config.model.dtype == "bfloat16"
        and config.distributed.deepspeed is None
        and config.training.projector_learning_rate
    ):
        problems.append(
            "distributed.deepspeed: without DeepSpeed's fp32 copies a bfloat16 projector does not train; name a "
            "DeepSpeed file, or freeze it with training.projector_learning_rate=null."
        )
    for task in config.benchmark.evaluated:
        where = f"benchmark task {task.name}"
        scorer = SCORERS.get(task.scorer)
        if scorer is None:
            problems.append(f"{where}: scorer '{task.scorer}' is none of {', '.join(SCORERS)}.")
        elif scorer.needs_references and evaluation_files(task, config.evaluation)[1] is None:
            problems.append(f"{where}: scorer '{task.scorer}' needs a file of reference captions; name it.")
    if problems:
        raise InputError(*problems)


def check_setup(config: RunConfig, ranks: int) -> None:
    """Checks the plan, the model, what scorers need to be installed, and that files and folders are there.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems = list(_collect(lambda: check_plan(config, ranks), lambda: family(config.model).tokenizer()))
    for task in config.benchmark.evaluated:
        scorer = SCORERS.get(task_scorer(task, config.evaluation))
        if scorer is not None:
            problems += (f"benchmark task {task.name}: {item}" for item in _collect(scorer.check))
        if not (config.data_root / task.images).is_dir():
            problems.append(f"benchmark task {task.name}: image folder {config.data_root / task.images} is missing.")
    problems += [f"{file}: is missing." for file in data_files(config) if not file.is_file()]
    if problems:
        raise InputError(*problems)


def check_records(config: RunConfig, progress: Progress = lambda task, done, total: None) -> list[TaskData]:
    """Reads every record and every image of every task and checks fields, ids, images and label masks.

    Raises:
        InputError: everything that is wrong, at once.
    """
    models = family(config.model)
    images = models.image_spec()
    chat = chat_format(models.chat, models.tokenizer(), images.token_id, images.tokens)
    problems: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [_check_task(config, task, chat, pool, progress, problems) for task in config.benchmark.evaluated]
    if problems:
        raise InputError(*problems)
    return found


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


def check_memory(config: RunConfig, ranks: int) -> None:
    """Checks that the weights, the statistics' fp32 sums and the optimizer's state fit in the memory of each rank.

    Activations come on top; how large they are depends on the batch.

    Raises:
        InputError: too little memory.
    """
    need = memory_bytes(config)
    if torch.cuda.is_available():
        have = min(torch.cuda.mem_get_info(device)[1] for device in range(torch.cuda.device_count()))
        where = "a GPU"
    else:
        have, where = psutil.virtual_memory().total // ranks, f"each of {ranks} ranks on this machine"
    if have < need:
        raise InputError(
            f"{config.model.path}: a rank needs at least {need / 1e9:.1f} GB of memory, {where} has {have / 1e9:.1f} "
            "GB; use fewer ranks on the machine, or a larger one."
        )


def memory_bytes(config: RunConfig) -> int:
    """Lower bound of a rank's memory: the larger of measuring (with fp32 sums) and of training (without ZeRO)."""
    models = family(config.model)
    skeleton = models.skeleton()
    width = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size()
    weights = width * sum(parameter.numel() for parameter in skeleton.parameters())
    targets = [target.module.weight for target in models.linear_targets(skeleton).values()]
    method = build_method(config.method)
    sums = sum(4 * weight.numel() for weight in targets) if "gradient" in method.before | method.after else 0
    prefix = models.projector_prefix() if config.training.projector_learning_rate else None
    trained = sum(config.lora.rank * sum(weight.shape) for weight in targets)
    trained += sum(p.numel() for p in skeleton.get_submodule(prefix).parameters()) if prefix else 0
    return weights + max(sums, 16 * trained)


def required_bytes(config: RunConfig) -> int:
    """Upper bound of the bytes of a run's tensors: adapters, their start, projectors, full bases, resume points."""
    models = family(config.model)
    skeleton = models.skeleton()
    shapes = [tuple(target.module.weight.shape) for target in models.linear_targets(skeleton).values()]
    adapters = sum(4 * config.lora.rank * (rows + columns) for rows, columns in shapes)
    prefix = models.projector_prefix()
    projector = sum(4 * p.numel() for p in skeleton.get_submodule(prefix).parameters()) if prefix else 0
    bases = sum(4 * columns * columns for _, columns in shapes)
    # A resume point holds the trained tensors with their two moments, and the next is written before it goes.
    resume = 6 * (adapters + projector) if config.training.checkpoint_every else 0
    return (2 * adapters + projector) * len(config.benchmark.tasks) + bases + resume


def _collect(*checks: Callable[[], object]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except InputError as error:
            yield from error.problems


def _check_task(
    config: RunConfig,
    task: TaskConfig,
    chat: ChatFormat,
    pool: ThreadPoolExecutor,
    progress: Progress,
    problems: list[str],
) -> TaskData:
    """Checks one task's files and adds what is wrong to `problems`."""
    root = config.data_root
    progress(task.name, 0, 0)
    train: list[TrainRecord] = []
    files: dict[str, Sequence[TrainRecord | QuestionRecord]] = {}
    if task.train is not None:
        files[task.train] = train = _read(load_train_records, root / task.train, problems)
    for name, references in ((task.test, task.references), (task.validation, task.validation_references)):
        if name is not None:
            files[name] = questions = _read(load_question_records, root / name, problems)
            captions = _read(load_caption_references, root / references, problems) if references else None
            if questions and (captions or not references):
                unmatched = reference_problems(task.scorer, questions, captions)
                problems += (f"{root / name}: {problem}" for problem in unmatched)
    paths = list(dict.fromkeys(path for records in files.values() for record in records for path in record.images))
    # Other threads decode images while this one computes masks.
    decoding = pool.map(lambda path: _image_problem(path, root / task.images), paths)
    if train:
        problems += _collect(lambda: measurement_indices(len(train), config.measurement.ratio))
        problems += _unusable(config, task, train, chat)
    broken: dict[str, str] = {}
    for done, (path, problem) in enumerate(zip(paths, decoding, strict=True), start=1):
        if problem is not None:
            broken[path] = problem
        progress(task.name, done, len(paths))
    for name, records in files.items():
        problems += _image_problems(root / name, records, broken)
    return TaskData(task, {name: len(records) for name, records in files.items()}, len(paths))


def _image_problem(path: str, root: Path) -> str | None:
    try:
        check_image(path, root)
    except InputError as error:
        return str(error)
    return None


def _image_problems(
    file: Path, records: Sequence[TrainRecord | QuestionRecord], broken: Mapping[str, str]
) -> list[str]:
    problems = [
        f"{file}: record {index} (id {record.id}), field image: {broken[path]}"
        for index, record in enumerate(records)
        for path in record.images
        if path in broken
    ]
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"{file}: {len(problems) - _LISTED} more images are missing or refused."]
    return problems


def _read(load: Callable[[Path], Any], file: Path, problems: list[str]) -> Any:
    """What `load` reads, or nothing and its problems."""
    try:
        return load(file)
    except InputError as error:
        problems += error.problems
        return []


def _unusable(
    config: RunConfig,
    task: TaskConfig,
    records: list[TrainRecord],
    chat: ChatFormat,
) -> list[str]:
    dataset = ConversationDataset(
        records,
        config.data_root / task.images,
        chat,
        max_length=config.training.max_length,
    )
    unusable = dataset.audit()
    listed = "; ".join(f"record {item.index} (id {item.id}): {item.reason}" for item in unusable[:_LISTED])
    if len(unusable) <= config.unmatched_limit * len(records):
        if unusable:
            logger.warning("%s: %d samples teach nothing: %s", task.name, len(unusable), listed)
        return []
    return [
        f"{config.data_root / str(task.train)}: {len(unusable)} of {len(records)} samples teach nothing, more than "
        f"the share unmatched_limit = {config.unmatched_limit:g} allows: {listed}. Correct them, or raise the limit."
    ]
