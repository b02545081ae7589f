"""What is protected, on disk: of bases every stage stores the columns it added, of running moments the whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from llava_cl.distributed import collect_tensors, gather_objects
from llava_cl.pipeline.job import Job
from llava_cl.store import RunDirectory, load_tensors, save_tensors
from llava_cl.subspace import orthonormal


def load_bases(run: RunDirectory, stage: int, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The bases `[in, k]` fp32 of the named layers after `stage`, put together from the stages 0..stage."""
    parts: dict[str, list[torch.Tensor]] = {}
    for number in range(stage + 1):
        for name, columns in load_tensors(run.stage(number).subspace, names)[0].items():
            parts.setdefault(name, []).append(columns)
    return {name: torch.cat(columns, dim=1) for name, columns in parts.items()}


def energy_within(weight: torch.Tensor, basis: torch.Tensor) -> float:
    """The share of a weight's energy (squared Frobenius norm) that is in protected directions, 0 to 1.

    Args:
        weight: `[out, in]`, any floating dtype.
        basis: `[in, k]` fp32, any columns; those of some methods are not orthonormal.
    """
    weight = weight.detach().float()
    total = float(weight.square().sum(dtype=torch.float64))
    inside = float((weight @ orthonormal(basis.to(weight.device))).square().sum(dtype=torch.float64))
    return min(inside / total, 1.0) if total else 0.0


def size_of(weight: torch.Tensor, basis: torch.Tensor) -> dict[str, float]:
    """What the report says of a basis `[in, k]`: `columns`, the dimensions that it spans, and `energy` (see above)."""
    span = orthonormal(basis)
    return {"columns": span.shape[1], "energy": energy_within(weight, span)}


def save_columns(
    job: Job,
    stage: int,
    mine: Mapping[str, torch.Tensor],
    sizes: Mapping[str, dict[str, float]],
    owners: Mapping[str, int],
) -> None:
    """Writes the columns that a stage added, collected from their owner ranks.

    Args:
        job: the job.
        stage: the stage that added them.
        mine: layer -> new columns `[in, j]` of the layers that this rank owns.
        sizes: layer -> `size_of` its weight and its whole basis, of the layers that this rank owns.
        owners: layer -> owner rank.
    """
    added = collect_tensors(mine, owners, job.world)
    layers = {name: dict(size) for part in gather_objects(dict(sizes), job.world) for name, size in part.items()}
    for name, columns in added.items():
        layers[name] |= {"of": columns.shape[0], "added": columns.shape[1]}
    if job.world.is_main:
        save_tensors(job.stage(stage).subspace, added, {"layers": layers})


def load_moments(
    run: RunDirectory, stage: int, inputs: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The running second moments `[in, in]` fp32 of inputs after `stage` >= 1, and the tokens behind each."""
    moments, metadata = load_tensors(run.stage(stage).moments, inputs)
    return moments, metadata["tokens"]


def update_moments(
    job: Job, stage: int, measured: Mapping[str, torch.Tensor], tokens: Mapping[str, int], owners: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Averages a task's second moments into the running ones over all tokens, and writes them.

    Args:
        job: the job.
        stage: the stage whose task was measured.
        measured: input -> mean of x x^T over the task's tokens, of the inputs that this rank owns.
        tokens: input -> the task's tokens, of all inputs.
        owners: input -> owner rank.

    Returns:
        The running moments of the inputs that this rank owns.
    """
    totals = dict(tokens)
    running = dict(measured)
    if stage > 1:
        past, past_tokens = load_moments(job.run, stage - 1, measured)
        for name in tokens:
            totals[name] += past_tokens[name]
        for name, moment in measured.items():
            running[name] = torch.lerp(past[name].to(moment.device), moment, tokens[name] / totals[name])
    everything = collect_tensors(running, owners, job.world)
    if job.world.is_main:
        save_tensors(job.stage(stage).moments, everything, {"tokens": totals})
    return running
