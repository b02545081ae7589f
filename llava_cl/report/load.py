"""Read and validate a run directory, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_cl.errors import InputError
from llava_cl.report.schema import LogLine, Metrics, RunInfo, StageScores, TaskScore
from llava_cl.store.stage_directory import LIVE_LOG

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
    """All the report needs of one run; `scores` are those of stage `scores_stage`, the latest scored."""

    directory: Path
    run: RunInfo
    metrics: Metrics
    stages: dict[int, StageRecord]
    scores: dict[str, TaskScore]
    scores_stage: int | None

    @property
    def done(self) -> int:
        """How many tasks the run has learned and committed."""
        return sum(stage.committed for stage in self.stages.values() if stage.number > 0)

    @property
    def complete(self) -> bool:
        """Whether every task of the stream is learned and committed."""
        return self.done == len(self.run.tasks)

    @property
    def current(self) -> int | None:
        """The stage that is under way (0 = the zero-shot stage), None between stages and at the end."""
        return next((number for number, stage in sorted(self.stages.items()) if not stage.committed), None)

    @property
    def state(self) -> str:
        """Where the run stands, in words: for example "stage 3 of 6 under way"."""
        total = len(self.run.tasks)
        if self.current == 0:
            return "zero-shot evaluation under way"
        if self.current is not None:
            return f"stage {self.current} of {total} under way"
        if self.done == 0:
            return f"no stage of {total} done yet"
        return f"complete, {total} stages" if self.complete else f"stage {self.done} of {total} done"


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory, finished or not.

    Only `run.json` has to exist; `metrics.json` and the stages' files are read where they are.

    Raises:
        InputError: a file is missing or does not follow its schema; every problem names its file.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir} is not a run directory: it has no run.json. Give the --output of a run.")
    problems: list[str] = []
    run = read_file(RunInfo, run_dir / "run.json", problems)
    metrics = None
    if (run_dir / "metrics.json").exists():
        metrics = read_file(Metrics, run_dir / "metrics.json", problems)
    elif run is not None:
        metrics = Metrics(format=1, tasks=run.tasks)
    if run is None or metrics is None:
        raise InputError(*problems)
    problems += [f"{run_dir / 'metrics.json'}: {problem}" for problem in metrics.shape_problems()]
    if metrics.tasks != run.tasks:
        problems.append(f"{run_dir / 'metrics.json'}: field tasks: not the tasks of run.json; remove the file")

    stages = {}
    scores_path: Path | None = None
    scores_stage = None
    for number in range(len(run.tasks) + 1):
        folders = sorted(path for path in (run_dir / "stages").glob(f"{number:02d}-*") if path.is_dir())
        if len(folders) > 1:
            names = ", ".join(folder.name for folder in folders)
            problems.append(f"{run_dir / 'stages'}: stage {number} has several folders ({names}); keep one")
        if len(folders) != 1:
            continue
        folder = folders[0]
        log = folder / "train_log.jsonl"
        lines = _read_log(log if log.exists() else folder / "checkpoints" / LIVE_LOG, problems)
        stages[number] = StageRecord(number, folder, (folder / "stage.json").is_file(), lines)
        if (folder / "scores.json").exists():
            scores_path, scores_stage = folder / "scores.json", number
    scores = read_file(StageScores, scores_path, problems) if scores_path else None
    if problems:
        raise InputError(*problems)
    return RunRecord(run_dir, run, metrics, stages, scores.scores if scores else {}, scores_stage)


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
        f"{where}: {_field(detail['loc'])}{detail['msg'][:1].lower()}{detail['msg'][1:]}"
        for detail in error.errors(include_url=False)
    ]


def _field(location: tuple[int | str, ...]) -> str:
    return f"field {'.'.join(map(str, location))}: " if location else ""


def _read_log(path: Path, problems: list[str]) -> dict[int, LogLine]:
    """The lines by step. A last line without its newline is still being written, and waits for the next report."""
    try:
        *lines, _unfinished = path.read_bytes().split(b"\n")
    except FileNotFoundError:  # not begun, or the rank has just taken the log of the training under way away
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
