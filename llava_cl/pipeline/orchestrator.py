"""The whole continual run: check, then stage after stage as jobs of their own; rerun to continue.

What is complete is read from the run directory alone, so a run can be killed at any moment and started again.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cl import __version__
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.methods import Methods
from llava_cl.models import family
from llava_cl.parsing import near_miss
from llava_cl.pipeline.data_checks import check_records
from llava_cl.pipeline.doctor import versions
from llava_cl.pipeline.job import recorded_config
from llava_cl.pipeline.launch import meet, progress_file, run_job
from llava_cl.pipeline.passes import count_passes
from llava_cl.pipeline.preflight import check_start
from llava_cl.pipeline.progress import Event, ProgressReader
from llava_cl.pipeline.results import write_results
from llava_cl.pipeline.scoring import answers_step, score_predictions
from llava_cl.pipeline.task_data import fingerprint_data
from llava_cl.stopping import Stopped, raising
from llava_cl.store import RunDirectory
from llava_cl.store.fingerprint import changed_code, fingerprint_code, fingerprint_model
from llava_cl.store.resume_points import resume_steps
from llava_cl.store.stage_directory import FORMAT
from llava_cl.training.deepspeed_file import result_settings
from llava_cl.training.sums import MEAN_INPUT


class Watcher:
    """Who is told how the run goes; this one does nothing about it."""

    def checking(self, what: str) -> None:
        """Something is being checked before the run."""

    def note(self, text: str) -> None:
        """Something that the user should know, and that stops nothing."""

    def plans(self, passes: Mapping[int, Mapping[str, float]]) -> None:
        """What the stages up to the last one will do, see `count_passes`."""

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        """A stage's job is about to start; `total` is the number of the last stage."""

    def event(self, event: Event) -> None:
        """A step of the stage got further."""

    def stage_ends(self, stage: int, metrics: dict[str, Any]) -> None:
        """A stage has been committed and the results rewritten."""


@dataclass(frozen=True)
class Launch:
    """Where a run goes, on how many ranks, how far, from which stage on it is to be done again, and whether it goes on
    with code of llava_cl that has changed.
    """

    output: Path
    ranks: int | None = None
    hostfile: Path | None = None
    until: int | None = None
    redo: int | None = None
    accept_code: bool = False


RunStage = Callable[[RunDirectory, int], None]


def execute(
    config: RunConfig,
    launch: Launch,
    watcher: Watcher,
    *,
    after_stage: Callable[[RunDirectory], object],
    run_stage: RunStage | None = None,
) -> dict[str, Any]:
    """Runs, or continues, a continual run.

    Args:
        config: the resolved configuration.
        launch: run directory, ranks, hosts, last stage.
        watcher: told how it goes.
        after_stage: called when a stage's results have been written, to rewrite the report.
        run_stage: runs one stage to its commit; default: a distributed job on `launch.ranks` ranks.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: something given is wrong, or the directory holds a different run.
        RunError: a job failed.
        Stopped: a signal came.
    """
    last = len(config.benchmark.tasks)
    until = last if launch.until is None else launch.until
    if not 0 <= until <= last:
        raise InputError(f"--until {until}: the stages are 0 (the base model) to {last}.")
    ranks, nodes = check_start(config, launch.output, launch.ranks, launch.hostfile)
    run = RunDirectory(launch.output.resolve(), [task.name for task in config.benchmark.tasks])
    with raising(), run.locked():
        if launch.hostfile:
            watcher.checking("whether ranks can be started on every node")
            meet(nodes, run.path)
        _open_run(config, run, ranks, watcher, accept_code=launch.accept_code)
        _set_aside(config, run, launch.redo, watcher)
        passes = count_passes(config, run.recorded("records")["records"])
        watcher.plans({stage: steps for stage, steps in passes.items() if stage <= until})
        metrics: dict[str, Any] | None = None
        for stage in range(until + 1):
            run.stage(stage).verify()
            if run.stage(stage).committed:
                continue
            watcher.stage_begins(stage, run.stage(stage).task, until)
            if run_stage is not None:
                run_stage(run, stage)
            else:
                _run_job(run, stage, launch, ranks, watcher, config)
            metrics = write_results(config, run)
            after_stage(run)
            watcher.stage_ends(stage, metrics)
        if metrics is None:
            # No stage was left, but the run can have been killed between the last commit and its report.
            metrics = write_results(config, run)
            after_stage(run)
        run.redone()
        return metrics


def evaluate(
    config: RunConfig, launch: Launch, watcher: Watcher, *, stages: Sequence[int] | None, task: str | None
) -> dict[int, dict[str, dict[str, Any]]]:
    """Scores models of a run; questions whose answers are not recorded yet are asked first.

    Args:
        config: the resolved configuration.
        launch: run directory, ranks, hosts.
        watcher: told how it goes.
        stages: which models, 0 = the base; None for every one there is.
        task: a task or probe; None for all.

    Returns:
        Stage -> task -> score, strict score and their parts.

    Raises:
        InputError: something given is wrong, a stage is not trained, or the directory holds a different run.
        RunError: a job failed.
        Stopped: a signal came.
    """
    tasks = [own for own in config.benchmark.evaluated if task in (None, own.name)]
    if not tasks:
        names = [own.name for own in config.benchmark.evaluated]
        raise InputError(f"--task {task}: {config.benchmark.name} has {', '.join(names)}.{near_miss(task, names)}")
    ranks, nodes = check_start(config, launch.output, launch.ranks, launch.hostfile, trains=False)
    run = RunDirectory(launch.output.resolve(), [own.name for own in config.benchmark.tasks])
    results = {}
    with raising(), run.locked():
        if launch.hostfile:
            watcher.checking("whether ranks can be started on every node")
            meet(nodes, run.path)
        _open_run(config, run, ranks, watcher, accept_code=launch.accept_code)
        trained = len(run.verified(None if stages is None else max(stages))) - 1
        chosen = range(trained + 1) if stages is None else stages
        if max(chosen) > trained:
            raise InputError(f"--stage {max(chosen)}: {run.path} is trained up to stage {trained}; run it first.")
        for stage in chosen:
            directory = run.stage(stage)
            there = [own for own in config.benchmark.evaluated_after(stage) if own in tasks]
            todo = [own.name for own in there if not directory.step_done(answers_step(own.name))]
            if todo:
                watcher.stage_begins(stage, directory.task, max(chosen))
                _run_job(run, stage, launch, ranks, watcher, config, tasks=todo)
            results[stage] = {own.name: score_predictions(config, directory, own) for own in there}
    return results


def _set_aside(config: RunConfig, run: RunDirectory, redo: int | None, watcher: Watcher) -> None:
    """Sets stages aside that are to be done again, once, and takes them out of the results."""
    aside = run.set_aside(redo)
    if aside:
        watcher.note(f"set aside, to be done again: {', '.join(map(str, aside))}")
        write_results(config, run)
    elif redo is not None:
        watcher.note(f"stage {redo} is being done again already; remove {run.redo} to set it aside anew")


def _run_job(
    run: RunDirectory,
    stage: int,
    launch: Launch,
    ranks: int,
    watcher: Watcher,
    config: RunConfig,
    *,
    tasks: Sequence[str] = (),
) -> None:
    """Runs a stage's job, or the evaluation of `tasks` alone, and passes its progress on to the watcher."""
    # The ranks load the code afresh.
    _refuse_changed_code(run, changed_code(run.recorded("code")["code"], fingerprint_code(config)))
    reader = ProgressReader(progress_file(run.path))

    def poll() -> None:
        for event in reader.new_events():
            watcher.event(event)

    try:
        run_job(
            run.path,
            stage,
            ranks=ranks,
            hostfile=launch.hostfile,
            distributed=config.distributed,
            poll=poll,
            tasks=tasks,
        )
    except Stopped as stopped:
        steps = resume_steps(run.stage(stage).checkpoints)
        kept = f"; kept: every complete step{f', and training up to step {steps[-1]}' if steps else ''}"
        raise Stopped(stopped.number, stopped.place + kept) from None


def _open_run(config: RunConfig, run: RunDirectory, ranks: int, watcher: Watcher, *, accept_code: bool) -> None:
    """Writes `run.json`, or compares it with what is to be run now."""
    code = fingerprint_code(config)
    identity = {**_identity(config), "deepspeed": result_settings(config.distributed.deepspeed)}
    if not (run.begun and run.manifest.is_file()):
        found = check_records(
            config, lambda task, done, total: watcher.checking(f"data of {task}") if not total else None
        )
        watcher.checking("fingerprints of model and data")
        run.record(
            {
                "format": FORMAT,
                "name": config.name,
                "started": _now(),
                "config": config.model_dump(mode="json"),
                "identity": identity,
                "version": __version__,
                "code": code,
                "environment": versions(),
                "benchmark": config.benchmark.name,
                "method": config.method.name,
                "tasks": [task.name for task in config.benchmark.tasks],
                "probes": [task.name for task in config.benchmark.probes],
                "records": {file: count for data in found for file, count in data.records.items()},
                "seed": config.seed,
                "ranks": ranks,
                **_fingerprints(config, FORMAT),
            },
        )
        return
    watcher.checking("fingerprints of model and data")
    before = run.recorded("format", "identity", "base", "data", "version", "code", "environment")
    fingerprints = _fingerprints(config, before["format"])
    if before["format"] == 1:  # which knew no fingerprints of pictures
        fingerprints["data"] = {name: own for name, own in fingerprints["data"].items() if name in before["data"]}
    now = {"identity": identity, "base": fingerprints["base"]["sha256"], "data": fingerprints["data"]}
    now["llava_cl"] = __version__
    # The recorded configuration is read again, so that options that came since have their defaults.
    recorded = {**_identity(recorded_config(run.path)), "deepspeed": before["identity"]["deepspeed"]}
    if recorded["deepspeed"] is True and identity["deepspeed"] is not False:
        recorded["deepspeed"] = identity["deepspeed"]
        watcher.note("an earlier version of llava_cl began the run, which did not record what its DeepSpeed file says")
    then = {"identity": recorded, "base": before["base"]["sha256"], "data": before["data"]}
    then["llava_cl"] = before["version"]
    if now != then:
        raise InputError(
            f"{run.path}: holds another run. What differs (- there, + now):\n{_difference(then, now)}\n"
            "Give another --output, or run it as it was."
        )
    changes = before.get("code_changes", [])
    changed = changed_code(before["code"], code)
    if changed:
        if not accept_code:
            _refuse_changed_code(run, changed)
        changes = [*changes, {"time": _now(), "files": changed}]
        watcher.note(f"the run goes on with other code of llava_cl, so its results may differ: {', '.join(changed)}")
    environment = versions()
    if environment != before["environment"]:
        # An update for safety's sake must not end a run of days.
        difference = _difference(before["environment"], environment)
        watcher.note(f"the run goes on with other packages, so its last bits may differ (- then, + now):\n{difference}")
    # Places may have changed, and the jobs read the configuration from here.
    now_there = {"config": config.model_dump(mode="json"), "ranks": ranks, "environment": environment, "code": code}
    run.record({**before, **fingerprints, **now_there, **({"code_changes": changes} if changes else {})})


def _fingerprints(config: RunConfig, run_format: int) -> dict[str, Any]:
    folders = family(config.model).folders()
    base = {"path": str(config.model.path), "sha256": fingerprint_model(folders, run_format)}
    return {"base": base, "data": fingerprint_data(config)}


def _refuse_changed_code(run: RunDirectory, changed: Sequence[str]) -> None:
    if changed:
        raise InputError(
            f"{run.path}: the code of llava_cl has changed since, in {', '.join(changed)}. Put it back, give another "
            "--output, or go on with --accept-code where the change does not matter to the results; run.json keeps "
            "that."
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a run's result depends on, of its configuration and its method; not of its DeepSpeed file."""
    identity = config.identity()
    methods = Methods(config.method)
    if MEAN_INPUT in methods.wanted("before") | methods.wanted("after"):
        identity["measurement"]["batch_size"] = config.measurement.batch_size
    return identity


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    before, after = dict(_leaves(then)), dict(_leaves(now))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            lines += [f"{sign} {key}: {side[key]}" for sign, side in (("-", before), ("+", after)) if key in side]
    return "\n".join(lines)


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value below a nested mapping or list, with its dotted key."""
    if not isinstance(content, dict | list):
        yield prefix, json.dumps(content)
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
