"""How many samples each step of each stage sends through the model."""

from __future__ import annotations

from collections.abc import Mapping

from llava_cl.config import AnyTask, RunConfig, TaskConfig
from llava_cl.methods import Methods
from llava_cl.pipeline.measuring import PARTS, measured_statistics
from llava_cl.pipeline.task_data import evaluation_files, evaluation_folder

_WITH_BACKWARD = 3
"""Forward passes that a forward and a backward pass take."""


def count_passes(config: RunConfig, records: Mapping[str, int]) -> dict[int, dict[str, float]]:
    """Forward passes of single samples by stage and step, in the order of the steps, named as their progress is.

    Steps that do something else with the model, such as `protect`, have 0; steps without anything to do are left out.

    Args:
        config: the run's configuration.
        records: the number of records of a file, or of pictures of a folder of classes, by its path in the data root.
    """
    methods = Methods(config.method)
    measured = {when: bool(measured_statistics(methods, when)) for when in PARTS}
    found = {}
    for stage in range(len(config.benchmark.tasks) + 1):
        steps: dict[str, float] = {}
        if stage:
            task = config.task(stage)
            samples = _WITH_BACKWARD * records[str(task.train)]
            share = config.measurement.ratio * samples
            steps |= {PARTS["before"]: share} if measured["before"] else {}
            steps |= {"initialise": 0.0, "train": float(config.epochs(task.name) * samples)}
            steps |= {PARTS["after"]: share} if measured["after"] else {}
        steps["protect"] = 0.0
        if stage or config.evaluation.zero_shot:
            asked = config.benchmark.evaluated_after(stage)
            steps |= {f"evaluate {task.name}": float(records[_asked(config, task)]) for task in asked}
        found[stage] = steps
    return found


def _asked(config: RunConfig, task: AnyTask) -> str:
    if isinstance(task, TaskConfig):
        return evaluation_files(task, config.evaluation)[0]
    return evaluation_folder(task, config.evaluation)
