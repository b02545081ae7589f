"""Everything that can be found wrong before a run spends anything: files, records, images, masks, ranks, disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_cl.config import RunConfig, TaskConfig
from llava_cl.data import (
    ConversationDataset,
    QuestionRecord,
    TrainRecord,
    load_caption_references,
    load_question_records,
    load_train_records,
    measurement_indices,
    resolve_image,
)
from llava_cl.errors import InputError
from llava_cl.evaluation.scorers import SCORERS, reference_problems
from llava_cl.methods import build_method
from llava_cl.models import ImageSpec, family
from llava_cl.pipeline.scoring import evaluation_files

logger = logging.getLogger(__name__)

_LISTED = 20


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
        if task.scorer in SCORERS:
            problems += (f"benchmark task {task.name}: {item}" for item in _collect(SCORERS[task.scorer].check))
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
    tokenizer, images = models.tokenizer(), models.image_spec()
    problems: list[str] = []
    for task in config.benchmark.evaluated:
        progress(task.name)
        problems += _check_task(config, task, tokenizer, images)
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
    config: RunConfig, task: TaskConfig, tokenizer: PreTrainedTokenizerBase, images: ImageSpec
) -> list[str]:
    root = config.data_root
    problems: list[str] = []
    if task.train is not None:
        train = _read(load_train_records, root / task.train, problems)
        problems += _missing_images(root / task.train, root / task.images, train)
        if train:
            problems += _collect(lambda: measurement_indices(len(train), config.measurement.ratio))
            problems += _unusable(config, task, train, tokenizer, images)
    for name, references in ((task.test, task.references), (task.validation, task.validation_references)):
        if name is not None:
            questions = _read(load_question_records, root / name, problems)
            problems += _missing_images(root / name, root / task.images, questions)
            captions = _read(load_caption_references, root / references, problems) if references else None
            if questions and (captions or not references):
                unmatched = reference_problems(task.scorer, questions, captions)
                problems += (f"{root / name}: {problem}" for problem in unmatched)
    return problems


def _read(load: Callable[[Path], Any], file: Path, problems: list[str]) -> Any:
    """What `load` reads, or nothing and its problems."""
    try:
        return load(file)
    except InputError as error:
        problems += error.problems
        return ()


def _missing_images(file: Path, root: Path, records: Sequence[TrainRecord | QuestionRecord]) -> list[str]:
    problems = []
    for index, record in enumerate(records):
        for path in record.images:
            try:
                resolve_image(path, root)
            except InputError as error:
                problems.append(f"{file}: record {index} (id {record.id}), field image: {error}")
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"{file}: {len(problems) - _LISTED} more images are missing or refused."]
    return problems


def _unusable(
    config: RunConfig,
    task: TaskConfig,
    records: list[TrainRecord],
    tokenizer: PreTrainedTokenizerBase,
    images: ImageSpec,
) -> list[str]:
    dataset = ConversationDataset(
        records,
        config.data_root / task.images,
        tokenizer,
        image_token_id=images.token_id,
        num_image_tokens=images.tokens,
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
