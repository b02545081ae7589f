"""Protected bases on disk: every stage stores only the columns it added."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from llava_cl.distributed import exchange_tensors, gather_objects
from llava_cl.pipeline.job import Job
from llava_cl.store import RunDirectory, load_tensors, save_tensors


def load_bases(run: RunDirectory, stage: int, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The bases `[in, k]` fp32 of the named layers after `stage`, put together from the stages 0..stage."""
    parts: dict[str, list[torch.Tensor]] = {}
    for number in range(stage + 1):
        for name, columns in load_tensors(run.stage(number).subspace, names)[0].items():
            parts.setdefault(name, []).append(columns)
    return {name: torch.cat(columns, dim=1) for name, columns in parts.items()}


def save_columns(
    job: Job, stage: int, mine: Mapping[str, torch.Tensor], before: Mapping[str, int], owners: Mapping[str, int]
) -> None:
    """Writes the columns that a stage added, collected from their owner ranks.

    Args:
        job: the job.
        stage: the stage that added them.
        mine: layer -> new columns `[in, j]` of the layers that this rank owns.
        before: layer -> columns that the basis had before the stage, of the layers that this rank owns.
        owners: layer -> owner rank.
    """
    added = exchange_tensors(mine, owners, job.world)
    counts = {name: count for part in gather_objects(dict(before), job.world) for name, count in part.items()}
    if job.world.is_main:
        sizes = {
            name: {"columns": counts.get(name, 0) + columns.shape[1], "added": columns.shape[1], "of": columns.shape[0]}
            for name, columns in added.items()
        }
        save_tensors(job.stage(stage).subspace, added, {"layers": sizes})
