"""The model after a stage, written down for other programs."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import torch

from llava_cl.distributed import World
from llava_cl.errors import InputError
from llava_cl.pipeline.job import Job, recorded_config
from llava_cl.pipeline.model_card import write_card
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory, writing
from llava_cl.store.fingerprint import fingerprint_model
from llava_cl.training.adapters import combine

PEFT = "peft"


def export(path: Path, stage: int, folder: Path, layout: str) -> None:
    """Writes the model as it is after a stage, with a model card.

    Args:
        path: run directory.
        stage: 0 = the base model, 1..T = after that task.
        folder: a folder that does not exist yet.
        layout: one of the family's checkpoint layouts, or "peft" for one adapter over the base model, whose update
            is the sum of the stages'.

    Raises:
        InputError: a stage that has not been trained or was changed since, a folder that exists, an unknown layout.
        RunError: the folder cannot be written.
    """
    # In the base's own precision, whatever that of the run was.
    config = recorded_config(path, ["model.dtype=auto"])
    run = RunDirectory(path, [task.name for task in config.benchmark.tasks])
    job = Job(config, run, World(0, 1, torch.device("cpu")), ProgressWriter(None))
    layouts = (*job.family.layouts, PEFT)
    stages = run.verified(max(stage, 0))
    trained = len(stages) - 1
    problems = []
    if layout not in layouts:
        problems.append(f"--format {layout}: the {config.model.family} family has {', '.join(layouts)}.")
    if not 0 <= stage <= len(config.benchmark.tasks):
        problems.append(f"--stage {stage}: the stages are 0 (the base model) to {len(config.benchmark.tasks)}.")
    elif trained < stage:
        problems.append(f"--stage {stage}: {path} is trained up to stage {trained}.")
    elif layout == PEFT and stage == 0:
        problems.append("--stage 0: the base model has no adapter.")
    if folder.exists():
        problems.append(f"--to {folder}: exists; give a new folder.")
    if problems:
        raise InputError(*problems)
    made = run.recorded("base", "format")
    if layout != PEFT and fingerprint_model(job.family.folders(), made["format"]) != made["base"]["sha256"]:
        raise InputError(f"{config.model.path}: is not the base model that {path} was made with; put that one there.")
    model = job.load_model(stage) if layout != PEFT else None
    # Of this process alone, so that exports to one folder at the same time do not mix.
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    with writing(folder, clean_up=lambda: shutil.rmtree(partial, ignore_errors=True)):
        partial.mkdir(parents=True)
        if model is None:
            combine([each.adapter for each in stages[1:]], partial)
        else:
            job.family.save(model, partial, layout)
        write_card(partial, config, run, stages, layout)
        if folder.exists():
            raise InputError(f"--to {folder}: was written meanwhile; give a new folder.")
        partial.rename(folder)
