"""The command line `llava-cl`: parsing and printing; the work is done in the layers below."""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID

from llava_cl.errors import InputError, LlavaClError
from llava_cl.stopping import Stopped
from llava_cl.terminal import Terminal, prepare_streams, say

app = typer.Typer(
    name="llava-cl",
    help="Continual instruction tuning of multimodal models without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of a disk that is full or read-only, which any file may meet, such as a log."""

ConfigFile = Annotated[Path, typer.Argument(help="A run file, for example configs/runs/ucit_keeplora.yaml.")]
Hostfile = Annotated[Path | None, typer.Option(help="Several nodes, in lines such as `node1 slots=8`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one configuration value; may be repeated.")
]

AcceptCode = Annotated[
    bool, typer.Option("--accept-code", help="Go on although the code of llava_cl has changed; run.json keeps that.")
]


@app.command()
def run(
    config: ConfigFile,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks per node: GPUs, or processes on a CPU.")] = None,
    hostfile: Hostfile = None,
    until: Annotated[int | None, typer.Option(min=0, help="Stop after this stage.")] = None,
    redo: Annotated[
        int | None, typer.Option(min=0, help="Do this stage and all later ones again; what is there is set aside.")
    ] = None,
    accept_code: AcceptCode = False,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print what would run; start nothing.")] = False,
) -> None:
    """Run a continual stream, or continue it: the same command picks up where the last one ended."""
    from llava_cl.config import load_config
    from llava_cl.pipeline.orchestrator import Launch, execute
    from llava_cl.report.live import LiveDisplay
    from llava_cl.report.live_page import LivePage
    from llava_cl.report.tracking import Tracking
    from llava_cl.report.watchers import Watchers

    resolved = load_config(config, overrides or ())
    launch = Launch(output or Path("runs") / resolved.name, nproc, hostfile, until, redo, accept_code)
    console = Terminal()
    if dry_run:
        from llava_cl.pipeline.dry_run import describe

        plan = describe(resolved, launch)
        console.print_json(json.dumps(plan), ensure_ascii=True)
        raise typer.Exit(InputError.exit_code if plan["missing"] else 0)
    with (
        LiveDisplay(console) as display,
        LivePage(launch.output, note=display.note) as page,
        Tracking(resolved, launch.output, display.note) as tracking,
    ):

        def after_stage(_: object) -> None:
            page.committed()
            tracking.update()

        metrics = execute(resolved, launch, Watchers(display, page, tracking), after_stage=after_stage)
        display.finished(metrics)
    say(console, f"report: {launch.output / 'report' / 'index.html'}")


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks per node that the run will have.")] = None,
    hostfile: Hostfile = None,
) -> None:
    """Check configuration, model, data, disk and memory for a run before anything is spent."""
    from rich.progress import BarColumn, Progress, TextColumn

    from llava_cl.config import load_config
    from llava_cl.pipeline.data_checks import check_records
    from llava_cl.pipeline.launch import meet
    from llava_cl.pipeline.preflight import check_start
    from llava_cl.pipeline.task_data import data_files, image_folders
    from llava_cl.report.console import data_table, data_tree

    resolved = load_config(config, overrides or ())
    console = Terminal()
    console.print(data_tree(resolved.data_root, [*data_files(resolved), *image_folders(resolved)]))
    _, nodes = check_start(resolved, output or Path("runs") / resolved.name, nproc, hostfile)
    if hostfile:
        meet(nodes, Path.cwd())
    columns = TextColumn("{task.description}", markup=False), BarColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in bars:
                bars[task] = progress.add_task(task, total=None)
            progress.update(bars[task], completed=done, total=total or None)

        found = check_records(resolved, show)
    console.print(data_table(found))
    for data in found:
        for note in data.unexpected():
            say(console, f"note: {note}", "yellow")
    say(console, "all good", "green")


@app.command(name="eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="A run file, or the directory of a run.")],
    stage: Annotated[int | None, typer.Option(min=0, help="0 = the base model; default: every stage there is.")] = None,
    task: Annotated[str | None, typer.Option(help="One task or probe; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name>.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks per node: GPUs, or processes on a CPU.")] = None,
    hostfile: Hostfile = None,
    accept_code: AcceptCode = False,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: stage, task, score.")] = False,
) -> None:
    """Score models of a run on its tasks; answers that are recorded are scored as they are, others are asked first."""
    from llava_cl.config import load_config
    from llava_cl.pipeline.job import recorded_config
    from llava_cl.pipeline.orchestrator import Launch
    from llava_cl.pipeline.orchestrator import evaluate as evaluate_run
    from llava_cl.report.console import scores_table
    from llava_cl.report.live import LiveDisplay

    if config.is_dir():
        resolved, output = recorded_config(config, overrides or ()), output or config
    else:
        resolved = load_config(config, overrides or ())
    launch = Launch(output or Path("runs") / resolved.name, nproc, hostfile, accept_code=accept_code)
    with LiveDisplay(Terminal(stderr=True)) as display:
        results = evaluate_run(resolved, launch, display, stages=None if stage is None else [stage], task=task)
    if as_json:
        say(Terminal(), json.dumps(results))
    else:
        Terminal().print(scores_table(results))


@app.command()
def score(
    benchmark: Annotated[str, typer.Option(help="Name of a shipped benchmark, or a benchmark YAML.")],
    task: Annotated[str, typer.Option(help="A task of the benchmark.")],
    questions: Annotated[Path, typer.Option(help="The task's test file.")],
    answers: Annotated[Path, typer.Option(help="Predictions: JSON Lines of question_id and text.")],
    references: Annotated[Path | None, typer.Option(help="Caption references, COCO style.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Another scorer than the task's: caption_overlap needs no Java.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score recorded predictions of one task, without a model."""
    from llava_cl.config import load_benchmark, shipped_benchmarks
    from llava_cl.parsing import near_miss
    from llava_cl.pipeline.scoring import score_files

    shipped = shipped_benchmarks()
    file = shipped.get(benchmark, Path(benchmark))
    if not file.exists():
        known = f"{', '.join(shipped)}.{near_miss(benchmark, shipped)}"
        raise InputError(f"--benchmark {benchmark}: is no file, and none of {known}")
    stream = load_benchmark(file)
    tasks = {entry.name: entry for entry in stream.evaluated}
    if task not in tasks:
        raise InputError(f"--task {task}: {stream.name} has {', '.join(tasks)}.{near_miss(task, tasks)}")
    result = score_files(tasks[task], questions, answers, references, scorer)
    if as_json:
        say(Terminal(), json.dumps(result))
        return
    strict = "" if result["strict_score"] is None else f" (strict {result['strict_score']:.2f})"
    say(Terminal(), f"{task}: {result['score']:.2f}{strict} percent of {result['items']} items")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    stage: Annotated[int, typer.Option(min=0, help="0 = the base model, 1..T = after that task.")],
    to: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    layout: Annotated[
        str, typer.Option("--format", help="hf (transformers), llava (its authors' layout) or peft (one adapter).")
    ] = "hf",
    push_to: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Also upload it, to a new private repository of a hub."),
    ] = None,
) -> None:
    """Write the model after a stage for other programs, with a model card."""
    from llava_cl.logging import setup_logging
    from llava_cl.pipeline.export import export as write
    from llava_cl.pipeline.hub import check_push, push

    setup_logging(level=logging.WARNING)
    if push_to is not None:
        check_push(push_to)
    write(run_dir, stage, to, layout)
    say(Terminal(), str(to))
    if push_to is not None:
        say(Terminal(), push(to, push_to))


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run directory, or several to compare.")],
    output: Annotated[Path, typer.Option(help="Where a comparison is written.")] = Path("comparison.html"),
    export: Annotated[
        bool, typer.Option("--export", help="Also write matrix and curves as PNG, PDF, CSV and LaTeX.")
    ] = False,
) -> None:
    """Rewrite a run's HTML report, or compare several runs on one page."""
    from llava_cl.logging import setup_logging
    from llava_cl.report import compare_runs, export_run, write_report

    setup_logging(level=logging.WARNING)
    files = [write_report(run_dirs[0]) if len(run_dirs) == 1 else compare_runs(run_dirs, output)]
    if export:
        files += [file for run_dir in run_dirs for file in export_run(run_dir)]
    for file in files:
        say(Terminal(), str(file))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A run file: tell what memory, disk and time it needs.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks to try; default: one a GPU, else two.")] = None,
    overrides: Overrides = None,
) -> None:
    """Look at packages, hardware and optional tools, and let ranks sum a number; exit code 1 if a run cannot work."""
    import torch

    from llava_cl.config import load_config
    from llava_cl.pipeline.doctor import diagnose
    from llava_cl.pipeline.launch import ranks_per_node
    from llava_cl.pipeline.planning import Needs
    from llava_cl.report.console import needs_tables

    resolved = load_config(config, overrides or ()) if config else None
    console, broken = Terminal(), False
    styles = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in diagnose(nproc or torch.cuda.device_count() or 2):
        broken |= finding.state == "problem"
        console.print(f"{finding.state:<8}", style=styles[finding.state], end="")
        say(console, f"{finding.subject}: {finding.detail}")
    if resolved is not None:
        ranks = nproc or ranks_per_node(resolved.distributed.ranks)
        needs = Needs.of(resolved, ranks, ranks)
        for table in needs_tables(needs):
            console.print(table)
        for problem in needs.problems:
            say(console, f"problem {problem}", "red")
        broken |= bool(needs.problems)
    raise typer.Exit(int(broken))


@app.command()
def benchmarks() -> None:
    """List the shipped benchmarks and their tasks."""
    from llava_cl.config import load_benchmark, shipped_benchmarks

    for name, file in shipped_benchmarks().items():
        stream = load_benchmark(file)
        say(Terminal(), f"{name}: {stream.description} {', '.join(task.name for task in stream.tasks)}")


@app.command()
def methods() -> None:
    """List the continual-learning methods."""
    from llava_cl.methods import known_methods

    for name, description in known_methods().items():
        say(Terminal(), f"{name}: {description}" if description else name)


def main() -> None:
    """Entry point: errors become one message on standard error and an exit code.

    1 = failed, 2 = wrong input, 130, 143 and 129 = stopped by SIGINT, SIGTERM and SIGHUP.
    """
    prepare_streams()
    try:
        if sys.flags.optimize > 1:
            raise InputError("python -OO takes away docstrings, which transformers reads: use -O (PYTHONOPTIMIZE=1).")
        app()
    except Stopped as stopped:
        say(Terminal(stderr=True), f"{stopped}. The same command goes on from there.", "yellow")
        sys.exit(stopped.exit_code)
    except (LlavaClError, OSError) as error:
        if isinstance(error, LlavaClError):
            told = error
        elif error.errno in _DISK:
            place = error.filename or "the output"
            told = LlavaClError(f"{place}: cannot be written ({error.strerror}); make room, then run it again.")
        elif error.filename is not None:
            told = InputError(f"{error.filename}: cannot be used ({error.strerror}).")
        else:
            raise
        say(Terminal(stderr=True), f"error: {told}", "red")
        sys.exit(told.exit_code)


if __name__ == "__main__":
    main()
