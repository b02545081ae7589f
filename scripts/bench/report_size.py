"""Size and loading time of the page of a large run: twenty tasks of 3,000 questions, answers and pictures made up.

    python scripts/bench/report_size.py --output runs/report_size

Prints what it measured and writes it to `report_size.json` in the output folder. Loading is timed in headless Chromium
from a file, where the browser is on the path; the browser is started anew for each of the loads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "report"))

from answered_runs import reference, write_answered_run
from browser import CHROMIUM, chromium

from llava_cl.report import write_report

LOADS = 5


def main() -> None:
    """Makes the run, writes its page and loads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--questions", type=int, default=3000)
    arguments = parser.parse_args()
    tasks = [f"Task{number}" for number in range(1, arguments.tasks + 1)]
    drawn = np.random.default_rng(0)
    right = drawn.random((arguments.tasks + 1, arguments.tasks, arguments.questions)) < 0.7

    def answer(stage: int, task: int, question: int) -> str:
        if right[stage, task, question]:
            return reference(task, question)
        return f"After stage {stage} the model says something long, but not what was asked for. " * 3

    run = write_answered_run(arguments.output, tasks, arguments.questions, answer, pictures=64)
    begin = time.perf_counter()
    page = write_report(run)
    found: dict[str, object] = {
        "tasks": arguments.tasks,
        "questions": arguments.questions,
        "megabytes": round(page.stat().st_size / 1e6, 2),
        "seconds_to_write": round(time.perf_counter() - begin, 2),
    }
    if CHROMIUM is not None:
        seconds = []
        for _ in range(LOADS):
            with chromium() as tab:
                begin = time.perf_counter()
                tab.open(page)
                seconds.append(time.perf_counter() - begin)
        found |= {"seconds_to_load": round(statistics.median(seconds), 2), "slowest_load": round(max(seconds), 2)}
    (arguments.output / "report_size.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
