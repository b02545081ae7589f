"""The page of one run: `write_report` reads a run directory, finished or not, and writes `report/`."""

from __future__ import annotations

from pathlib import Path

from llava_cl.evaluation.metrics import mean
from llava_cl.report.basis import basis_panels
from llava_cl.report.curves import columns_over_stages, loss_panel, stage_panels
from llava_cl.report.document import document, panels, section
from llava_cl.report.heatmap import accuracy_table
from llava_cl.report.load import RunRecord, load_run, verified, warn
from llava_cl.report.schema import first_probed
from llava_cl.report.tables import cost_table, metrics_table, score_table, settings_table
from llava_cl.report.text import duration, escape, metric, percent, signed
from llava_cl.report.timeline import timeline
from llava_cl.store import write_text

TILES = {"MFN": "mean accuracy (MFN)", "BWT": "backward transfer (BWT)", "Transfer": "before learning (Transfer)"}
ANSWERS = (
    "What became of each task's test questions since the task was learned, and a few of them with what the model "
    "said after every stage. Full cells are right answers, empty ones wrong; the framed stage learned the task."
)


def write_report(run_dir: Path) -> Path:
    """(Re)write `run_dir/report/index.html`.

    Works at any time of a run; a section whose data is not there yet is left out.

    Returns:
        Its path.

    Raises:
        InputError: `run.json` is missing or does not follow its schema. What else is wrong stands in the page.
    """
    record = verified(load_run(Path(run_dir)))
    warn(record)
    page = record.directory / "report" / "index.html"
    write_text(page, render_page(record, answers=timeline(record)))
    return page


def render_page(
    record: RunRecord, *, answers: str = "", status: str = "", ended: str = "", refresh: int | None = None
) -> str:
    """The whole page as HTML.

    Args:
        record: the run.
        answers: what `timeline` made of it.
        status: what the stage under way is at.
        ended: how a run ended that was not to end there, "stopped" or "failed".
        refresh: see `document`.
    """
    state = record.state
    if ended:
        state = state.replace("under way", ended) if record.current is not None else f"{state}, then {ended}"
    body = [
        _headline(record, f"{state}: {status}" if status else state),
        _damage(record),
        _accuracy(record),
        section("Answers", answers, ANSWERS) if answers else "",
        *(part(record) for part in (_metrics, _curves, _retention, _bases, _losses, _costs, _settings)),
    ]
    return document(f"{record.run.name}: {state}", "".join(body), refresh)


def _headline(record: RunRecord, state: str) -> str:
    run = record.run
    progress = {number: "done" if stage.committed else "underway" for number, stage in record.stages.items()}
    pips = "".join(
        f'<li class="{progress.get(number, "ahead")}" title="{escape(task)}"><span>{number}</span> {escape(task)}</li>'
        for number, task in enumerate(run.tasks, start=1)
    )
    facts = (
        f"base {Path(run.base.path).name}, sha256 {run.base.sha256[:12]}",
        f"seed {run.seed}",
        f"{run.ranks} rank{'s' if run.ranks > 1 else ''}",
        f"started {run.started:%Y-%m-%d %H:%M}",
    )
    state = escape(state[0].upper() + state[1:])
    return (
        f'<header><p class="over">{escape(run.method)} on {escape(run.benchmark)}</p>'
        f'<h1>{escape(run.name)}</h1><p class="state">{state}</p><ol class="pips">{pips}</ol>'
        f'{_tiles(record)}<p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>'
        "</header>\n"
    )


def _damage(record: RunRecord) -> str:
    if not record.problems:
        return ""
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in record.problems)
    note = "Files of the run were changed, cannot be read, or belong to another run: do not rely on what is shown here."
    return section("Damaged", f'<ul class="damage">{listed}</ul>', note)


def _tiles(record: RunRecord) -> str:
    summary, probes, matrix = record.metrics.summary or {}, record.metrics.probes.rows, record.metrics.matrix
    tiles: dict[str, str] = {}
    if not summary and matrix:
        tiles["mean accuracy of the tasks seen"] = percent(mean(matrix[-1][: len(matrix)]), 2)
    tiles |= {text: metric(name, summary[name]) for name, text in TILES.items() if summary.get(name) is not None}
    if len(probes) > 1:
        before, now = mean(probes[0]), mean(probes[-1])
        if before is not None and now is not None:
            tiles["on the base's own questions"] = signed(now - before, 2)
    drawn = "".join(f"<div><dt>{escape(text)}</dt><dd>{value}</dd></div>" for text, value in tiles.items())
    return f'<dl class="tiles">{drawn}</dl>' if drawn else ""


def _accuracy(record: RunRecord) -> str:
    metrics = record.metrics
    majority = metrics.majority if any(share is not None for share in metrics.majority.values()) else None
    note = (
        "Percent on every task (columns) after every stage (rows); below the diagonal, in small, "
        "the change since the task was learned."
    )
    if majority:
        note += " Majority: the share of the most frequent answer."
    body = accuracy_table(metrics.tasks, metrics.matrix, metrics.base_row, majority)
    if metrics.strict_matrix and metrics.strict_matrix != metrics.matrix:
        body += _fold("Strict scoring", accuracy_table(metrics.tasks, metrics.strict_matrix))
    if record.scores:
        name = f"Scores after stage {record.scores_stage}" if record.scores_stage else "Scores of the base"
        order = [task for task in (*metrics.tasks, *record.run.probes) if task in record.scores]
        body += _fold(name, score_table({task: record.scores[task] for task in order}))
    return section("Accuracy", body, note)


def _metrics(record: RunRecord) -> str:
    return section("Metrics", metrics_table(record.metrics.summary)) if record.metrics.summary else ""


def _curves(record: RunRecord) -> str:
    metrics = record.metrics
    if not metrics.rows:
        return ""
    lines = columns_over_stages(metrics.rows, metrics.first_stage)
    drawn = stage_panels(metrics.tasks, lines, (metrics.first_stage, len(metrics.tasks)), "tasks", learned=True)
    note = "Every task's accuracy by stage, dashed until the task is learned; the other tasks are faint."
    return section("Through the stages", drawn, note)


def _retention(record: RunRecord) -> str:
    probes = record.metrics.probes
    if not probes.rows or not probes.names:
        return ""
    lines = columns_over_stages(probes.rows, first_probed(record.metrics))
    drawn = stage_panels(probes.names, lines, (0, len(record.run.tasks)), "probes")
    return section("What the base knew", drawn, "Accuracy by stage on the base model's own questions.")


def _bases(record: RunRecord) -> str:
    stages = record.metrics.stages
    html = ""
    if rank := basis_panels(stages, lambda layer: layer.fill, "rank of the basis"):
        note = "Share of each layer's input dimensions that is protected: blocks across, stages down, means right."
        html += section("Rank of the bases", panels(rank), note)
    if energy := basis_panels(stages, lambda layer: layer.energy, "protected energy"):
        note = "Share of each weight's squared norm that is in protected directions, in the same way."
        html += section("Protected energy", panels(energy), note)
    return html


def _losses(record: RunRecord) -> str:
    drawn = [
        loss_panel(f"{number} {record.run.tasks[number - 1]}", stage.losses)
        for number, stage in record.stages.items()
        if number > 0 and stage.losses
    ]
    note = "By step, each stage on its own scale; the last value in numbers."
    return section("Training loss", panels(drawn), note) if drawn else ""


def _costs(record: RunRecord) -> str:
    stages = [stage for stage in record.metrics.stages if stage.seconds or stage.peak_memory_bytes]
    if not stages:
        return ""
    total = sum(sum(stage.seconds.values()) for stage in stages)
    note = f"{duration(total)} in all. Memory is the peak of the rank that takes the most, while a step ran and in all."
    return section("Time and memory", cost_table(stages), note)


def _settings(record: RunRecord) -> str:
    run = record.run
    blocks = {
        "Configuration": run.config,
        "Environment": run.environment,
        "Base model": {"path": run.base.path, "sha256": run.base.sha256},
    }
    if run.code_changes:
        blocks["Code that changed during the run"] = {each.time: ", ".join(each.files) for each in run.code_changes}
    return section("Settings", "".join(_fold(name, settings_table(block)) for name, block in blocks.items()))


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
