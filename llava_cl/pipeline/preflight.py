"""What can be found wrong before a run spends anything: plan, model, files, ranks, disk, memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from llava_cl.config import ClassTaskConfig, RunConfig, TaskConfig
from llava_cl.errors import InputError, problems_of
from llava_cl.evaluation.scorers import SCORERS
from llava_cl.listing import other_spelling
from llava_cl.methods import Methods
from llava_cl.models.reading import reading
from llava_cl.parsing import near_miss
from llava_cl.pipeline.activations import batch_size, try_model
from llava_cl.pipeline.doctor import MORE_SHARED, SHARED_MEMORY, check_flash_attention, check_gpu
from llava_cl.pipeline.launch import hosts, ranks_per_node
from llava_cl.pipeline.measuring import TIMES, sums_to_measure
from llava_cl.pipeline.planning import Shapes, host_memory_problems, least_memory, predict_disk
from llava_cl.pipeline.samples import chosen_targets, samples_of
from llava_cl.pipeline.scoring import task_scorer
from llava_cl.pipeline.task_data import data_files, evaluation_files, image_folders
from llava_cl.store import RunDirectory
from llava_cl.training.deepspeed_file import check_deepspeed, deepspeed_config, zero_stage


def check_plan(config: RunConfig, ranks: int) -> None:
    """Checks what needs neither model nor data: method, number of ranks, scorers.

    Raises:
        InputError: everything that is wrong, at once.
    """
    found = problems_of(lambda: _check_method(config), lambda: check_deepspeed(config, ranks))
    problems = list(dict.fromkeys([*found, *problems_of(lambda: config.training.micro_batch_for(ranks))]))
    columns, rank = config.measurement.sketch, config.lora.rank
    if columns is not None and columns < rank:
        problems.append(
            f"measurement.sketch: a sketch of {columns} columns does not hold the {rank} directions of lora.rank; give "
            f"it {4 * rank}, or null for none."
        )
    if config.model.dtype == "auto":
        problems.append("model.dtype: a run computes in float32 or bfloat16; 'auto' is for exports.")
    single = [key for key in ("dtype", "merged_dtype") if getattr(config.model, key) == "float32"]
    if single and config.model.attention == "flash_attention_2":
        problems.append(f"model.attention: flash_attention_2 has no float32, which model.{single[0]} is; use sdpa.")
    if config.model.dtype == "bfloat16" and config.distributed.deepspeed is None:
        way = "name a DeepSpeed file"
        if isinstance(config.benchmark.tasks[0], ClassTaskConfig):
            if config.model.family != "clip" or config.model.cosine_heads:
                problems.append(
                    f"distributed.deepspeed: without its fp32 copies a bfloat16 head does not train; {way}."
                )
        elif config.training.projector_learning_rate:
            problems.append(
                f"distributed.deepspeed: without its fp32 copies a bfloat16 projector does not train; {way}, or freeze "
                "it with training.projector_learning_rate=null."
            )
    for task in config.benchmark.evaluated:
        where = f"benchmark task {task.name}"
        scorer = SCORERS.get(task.scorer)
        if scorer is None:
            close = near_miss(task.scorer, SCORERS)
            problems.append(f"{where}: scorer '{task.scorer}' is none of {', '.join(SCORERS)}.{close}")
        elif not scorer.needs_references or not isinstance(task, TaskConfig):
            continue
        elif evaluation_files(task, config.evaluation)[1] is None:
            problems.append(f"{where}: scorer '{task.scorer}' needs a file of reference captions; name it.")
    if problems:
        raise InputError(*problems)


def check_start(
    config: RunConfig, output: Path, asked: int | None, hostfile: Path | None, *, trains: bool = True
) -> tuple[int, list[str]]:
    """Checks all but the records that can be known before a run spends anything, or an evaluation of one.

    Args:
        config: the run's configuration.
        output: the run directory.
        asked: ranks on each node, as asked for on the command line.
        hostfile: of several nodes.
        trains: whether memory and disk must hold a training.

    Returns:
        The ranks to start on each node, and the nodes.

    Raises:
        InputError: everything that is wrong, at once.
    """
    ranks = ranks_per_node(config.distributed.ranks, asked)
    nodes: list[str] = []
    problems = [*problems_of(lambda: nodes.extend(hosts(hostfile, ranks)), check_gpu, lambda: _check_output(output))]
    problems += problems_of(lambda: check_setup(config, ranks * max(len(nodes), 1)))
    if trains and not problems:
        problems += problems_of(lambda: check_memory(config, ranks))
        if not RunDirectory(output, ()).begun:
            problems += problems_of(lambda: check_disk(config, output))
    if problems:
        raise InputError(*problems)
    return ranks, nodes


def _check_output(output: Path) -> None:
    try:
        above = (output, *output.absolute().parents)
        place = next(folder for folder in above if folder.exists() or folder.is_symlink())
        wrong = None if place.is_dir() else "is no folder"
        if wrong is None and not os.access(place, os.W_OK | os.X_OK):
            wrong = "cannot be written (Permission denied)"
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        place, wrong = Path(output.name[:100]), f"is no place for a run ({getattr(error, 'strerror', error)})"
    if wrong:
        raise InputError(f"{place}: {wrong}; give another --output.")


def _unreadable(path: Path, *, folder: bool) -> str | None:
    """What keeps a file or folder from being read."""
    try:
        if not (path.is_dir() if folder else path.is_file()):
            return "this folder is missing" if folder else "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    allowed = os.access(path, os.R_OK | os.X_OK if folder else os.R_OK)
    return None if allowed else "cannot be read (Permission denied)"


def check_setup(config: RunConfig, ranks: int) -> None:
    """Checks the plan, the model with its weights' names and shapes, scorers' tools, and that files are there.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems = list(problems_of(lambda: check_plan(config, ranks), lambda: _check_attention(config)))
    # Otherwise the model cannot be made.
    problems += [] if problems else problems_of(lambda: _check_model(config))
    for task in config.benchmark.evaluated:
        scorer = SCORERS.get(task_scorer(task, config.evaluation))
        if scorer is not None:
            problems += (f"benchmark task {task.name}: {item}" for item in problems_of(scorer.check))
    for paths, folder in ((image_folders(config), True), (data_files(config), False)):
        unreadable = ((path, _unreadable(path, folder=folder)) for path in paths)
        problems += [f"{path}: {wrong}.{other_spelling(path)}" for path, wrong in unreadable if wrong]
    if problems:
        raise InputError(*problems)


def check_disk(config: RunConfig, folder: Path) -> None:
    """Checks that the run's files fit on the disk of `folder`.

    Raises:
        InputError: too little space is free.
    """
    need = sum(predict_disk(config, Shapes.of(config, samples_of(config))).values())
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise InputError(
            f"{folder}: the run needs up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space or give another --output."
        )


def check_memory(config: RunConfig, ranks: int) -> None:
    """Checks that what a rank surely needs fits in its memory: all but activations, which come on top.

    Sums that are kept in host memory beside a GPU's must fit in what is free there, and batches that are handed over
    by processes that read data in shared memory.

    Raises:
        InputError: too little memory.
    """
    shapes = Shapes.of(config, samples_of(config))
    problems = [*host_memory_problems(shapes, ranks), *_shared_memory_problems(config, ranks)]
    if problems:
        raise InputError(*problems)
    need = least_memory(config, shapes, ranks)
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


def _shared_memory_problems(config: RunConfig, ranks: int) -> list[str]:
    """What is wrong where /dev/shm does not hold the batches of images that wait for `ranks` ranks of this node."""
    if not config.training.workers or not SHARED_MEMORY.is_dir():
        return []
    batch = max(batch_size(config, step, ranks) for step in ("measure", "train", "evaluate"))
    # Every process keeps two batches ready, in float32.
    need = ranks * config.training.workers * 2 * batch * 3 * samples_of(config).family.image_spec().size ** 2 * 4
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need <= free:
        return []
    return [
        f"training.workers: the batches that {config.training.workers} processes of each rank keep ready take "
        f"{need / 1e9:.2g} GB of {SHARED_MEMORY}, {free / 1e9:.2g} GB are free. {MORE_SHARED}, or take fewer workers."
    ]


def _check_attention(config: RunConfig) -> None:
    if config.model.attention == "flash_attention_2":
        try:
            check_flash_attention()
        except InputError as error:
            raise InputError(f"model.attention: flash_attention_2 is {error}") from error


def _check_model(config: RunConfig) -> None:
    """Looks at everything of the checkpoint but the values of its weights."""
    samples = samples_of(config)
    with reading(config.model.path, "the model does not work as its config.json describes it"):
        try_model(config, samples)
    model = samples.family.load(torch.device("meta"))
    targets = chosen_targets(config, samples.family, model)
    problems = samples.problems(model)
    if problems:
        raise InputError(*problems)
    parts = {target.part for target in targets.values()}
    strange = sorted(set(config.method.parts) - parts)
    if strange:
        raise InputError(
            f"method.parts: {', '.join(strange)} is no part of a model of family '{config.model.family}'."
            f"{near_miss(strange[0], parts)}"
        )
    methods = Methods(config.method)
    for name, (module, _, part) in targets.items():
        problem = methods.of(part).problem((module.out_features, module.in_features))
        if problem:
            shape = f"{module.out_features} x {module.in_features}"
            raise InputError(f"{problem}, but {name} is {shape}; leave it out of lora.targets, or change the option.")
    place = config.measurement.sums
    planned = [item for when in TIMES for item in sums_to_measure(config, targets, when)]
    largest = max(planned, key=lambda item: item.bytes, default=None)
    if isinstance(place, float) and largest is not None and largest.bytes > place * 1e9:
        raise InputError(
            f"measurement.sums: {place:g} GB do not hold the {largest.kind} of {largest.name}, which takes "
            f"{largest.bytes / 1e9:.3g} GB; give as much at least, or 'host'."
        )


def _check_method(config: RunConfig) -> None:
    deepspeed = deepspeed_config(config.distributed.deepspeed, torch.device("cpu"))
    if Methods(config.method).penalises and zero_stage(deepspeed) == 3:
        raise InputError(
            f"distributed.deepspeed: {config.method.name} adds a penalty on LoRA A to the loss, which ZeRO-3 takes "
            "apart; use ZeRO-1 or 2."
        )
