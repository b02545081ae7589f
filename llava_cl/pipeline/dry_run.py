"""What a run would do, without starting anything and without needing its data or weights."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from typing import Any

from llava_cl.config import RunConfig
from llava_cl.errors import InputError, problems_of
from llava_cl.pipeline.launch import Meeting, hosts, ranks_per_node, torchrun, worker
from llava_cl.pipeline.orchestrator import Launch
from llava_cl.pipeline.planning import Needs
from llava_cl.pipeline.preflight import check_start


def describe(config: RunConfig, launch: Launch) -> dict[str, Any]:
    """The resolved configuration, each stage's hyper-parameters and command line, what is missing, and the needs.

    Memory, disk and time are told if nothing is missing (`llava-cl doctor CONFIG` does without the data).

    Raises:
        InputError: the ranks cannot share the global batch.
    """
    ranks = ranks_per_node(config.distributed.ranks, launch.ranks)
    nodes: list[str] = []
    with contextlib.suppress(InputError):  # told under `missing`
        nodes = hosts(launch.hostfile, ranks)
    total = ranks * max(len(nodes), 1)
    # The first node's; address and port are chosen when a stage begins.
    launcher = torchrun(ranks, Meeting(nodes, nodes[0], "PORT") if launch.hostfile and nodes else None)
    config.training.micro_batch_for(total)
    output = launch.output.absolute()
    missing = list(problems_of(lambda: check_start(config, launch.output, launch.ranks, launch.hostfile)))
    return {
        "name": config.name,
        "output": str(output),
        "ranks_per_node": ranks,
        "missing": missing,
        "needs": None if missing else dataclasses.asdict(Needs.of(config, total, ranks)),
        "stages": [
            {
                "stage": number,
                "task": task.name,
                "epochs": config.epochs(task.name),
                "learning_rate": config.learning_rate(task.name),
                "command": shlex.join([*launcher, *worker(output, number)]),
            }
            for number, task in enumerate(config.benchmark.tasks, start=1)
        ],
        "config": config.model_dump(mode="json"),
    }
