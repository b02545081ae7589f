"""Read and validate a run directory, finished or not."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_cl.errors import InputError
from llava_cl.parsing import read_text
from llava_cl.pipeline.results import collect_results, matrix_csv
from llava_cl.report.schema import LogLine, Metrics, RunInfo, StageScores, TaskScore
from llava_cl.store import RunDirectory

logger = logging.getLogger(__name__)

Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class StageRecord:
    """One stage that has a folder: its number (0 = the untouched base) and the log of its training by step."""

    number: int
    folder: Path
    committed: bool
    log: dict[int, LogLine]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {step: line.loss for step, line in self.log.items()}


@dataclass(frozen=True)
class RunRecord:
    """All the report needs of one run; `scores` are those of stage `scores_stage`, the latest scored.

    `problems` is what cannot be read, or not be trusted: what is shown is not more than the rest of it.
    """

    directory: Path
    run: RunInfo
    metrics: Metrics
    stages: dict[int, StageRecord]
    scores: dict[str, TaskScore]
    scores_stage: int | None
    problems: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """How many tasks the run has learned and committed."""
        return sum(stage.committed for stage in self.stages.values() if stage.number > 0)

    @property
    def complete(self) -> bool:
        """Whether every task of the stream is learned and committed, and nothing is wrong with the run's files."""
        return self.done == len(self.run.tasks) and not self.problems

    @property
    def current(self) -> int | None:
        """The stage that is under way (0 = the zero-shot stage), None between stages and at the end."""
        return next((number for number, stage in sorted(self.stages.items()) if not stage.committed), None)

    @property
    def state(self) -> str:
        """Where the run stands, in words: for example "stage 3 of 6 under way"."""
        return self._place + (", damaged" if self.problems else "")

    @property
    def _place(self) -> str:
        total = len(self.run.tasks)
        if self.current == 0:
            return "zero-shot evaluation under way"
        if self.current is not None:
            return f"stage {self.current} of {total} under way"
        if self.done == 0:
            return f"no stage of {total} done yet"
        return f"complete, {total} stages" if self.done == total else f"stage {self.done} of {total} done"


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory, finished or not.

    Only `run.json` has to exist; `metrics.json` and the stages' files are read where they are, and left out, among the
    record's problems, where they cannot be read.

    Raises:
        InputError: `run.json` is missing or does not follow its schema.
    """
    run_dir = Path(run_dir)
    if not os.path.isfile(run_dir / "run.json"):  # noqa: PTH113 - Path.is_file raises in a folder that cannot be read
        raise InputError(f"{run_dir} is not a run directory: it has no run.json. Give the --output of a run.")
    problems: list[str] = []
    run = read_file(RunInfo, run_dir / "run.json", problems)
    if run is None:
        raise InputError(*problems)
    metrics = read_file(Metrics, run_dir / "metrics.json", problems) if (run_dir / "metrics.json").exists() else None
    if metrics is not None:
        wrong = metrics.shape_problems()
        if metrics.tasks != run.tasks:
            wrong.append("field tasks: not the tasks of run.json")
        problems += (f"{run_dir / 'metrics.json'}: {problem}" for problem in wrong)
        metrics = None if wrong else metrics
    stages: dict[int, StageRecord] = {}
    scores: dict[str, TaskScore] = {}
    scores_stage = None
    directory = RunDirectory(run_dir, run.tasks)
    for stage in (directory.stage(0), *directory.stages()):
        if stage.path.is_dir():
            log = stage.train_log if stage.train_log.exists() else stage.live_log
            stages[stage.stage] = StageRecord(stage.stage, stage.path, stage.committed, _read_log(log, problems))
        if stage.scores.exists() and (found := read_file(StageScores, stage.scores, problems)):
            scores, scores_stage = found.scores, stage.stage
    known = metrics or Metrics(format=1, tasks=run.tasks)
    return RunRecord(run_dir, run, known, stages, scores, scores_stage, tuple(problems))


def verified(record: RunRecord) -> RunRecord:
    """The record, with what was changed since it was recorded, or does not belong to the run, among its problems."""
    directory, problems = RunDirectory(record.directory, record.run.tasks), list(record.problems)
    advice = "is not what the stages say; run the same command again to have it written anew."
    try:
        committed = [stage for stage in directory.verified() if stage.committed]
        rows = len(record.metrics.matrix) if directory.metrics.exists() else -1
        shown = [stage for stage in committed if stage.stage <= rows]
        benchmark = record.run.config.get("benchmark")
        seen = isinstance(benchmark, dict) and benchmark.get("evaluate") == "seen"
        expected = collect_results(shown, record.run.tasks, record.run.probes, seen=seen)
        # The last stage may have been committed a moment ago.
        if len(committed) - len(shown) > 1 or not _alike(record.metrics, parse_metrics(expected)):
            problems.append(f"{directory.metrics}: {advice}")
        elif directory.matrix.exists() and read_text(directory.matrix) != matrix_csv(expected):
            problems.append(f"{directory.matrix}: {advice}")
    except InputError as error:
        problems += error.problems
    return replace(record, problems=tuple(problems))


def warn(record: RunRecord) -> None:
    """Tells of what is wrong with a run that is shown all the same."""
    for problem in record.problems:
        logger.warning("%s", problem)


def _alike(metrics: Metrics, expected: Metrics) -> bool:
    """Whether the tables are the same; of the summary, what both have, as another version may have more."""
    ours, theirs = metrics.summary or {}, expected.summary or {}
    tables = ((own.matrix, own.strict_matrix, own.base_row, own.probes) for own in (metrics, expected))
    return len(set(map(repr, tables))) == 1 and all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def parse_metrics(metrics: Metrics | Mapping[str, Any]) -> Metrics:
    """Validate the content of a metrics.json.

    Raises:
        InputError: it does not follow the schema.
    """
    try:
        parsed = Metrics.model_validate(metrics)
    except ValidationError as error:
        raise InputError(*_problems(error, "metrics")) from error
    if problems := parsed.shape_problems():
        raise InputError(*(f"metrics: {problem}" for problem in problems))
    return parsed


def read_file(schema: type[Record], path: Path, problems: list[str]) -> Record | None:
    """The content of a JSON file by its schema, or None where `problems` has grown by what is wrong with it."""
    try:
        return schema.model_validate_json(path.read_bytes())
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
    except ValidationError as error:
        problems += _problems(error, str(path))
    return None


def _problems(error: ValidationError, where: str) -> list[str]:
    return [
        where
        + (f": field {'.'.join(map(str, detail['loc']))}" if detail["loc"] else "")
        + f": {detail['msg'][:1].lower()}{detail['msg'][1:]}"
        for detail in error.errors(include_url=False)
    ]


def _read_log(path: Path, problems: list[str]) -> dict[int, LogLine]:
    """The lines by step. A last line without its newline is still being written, and waits for the next report."""
    try:
        *lines, _unfinished = path.read_bytes().split(b"\n")
    except FileNotFoundError:  # not begun, or the rank has just taken the log of the training under way away
        return {}
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return {}
    found: dict[int, LogLine] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = LogLine.model_validate_json(line)
        except ValidationError as error:
            problems += _problems(error, f"{path}, line {number}")
            break
        found[entry.step] = entry
    return dict(sorted(found.items()))
