"""Plain HTML tables: metrics, scores, costs, and nested settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_cl.report.schema import StageCost, TaskScore
from llava_cl.report.text import MISSING, duration, escape, memory, metric, percent, shown

STEPS = ("load", "measure", "initialise", "train", "protect", "evaluate", "score")
"""The steps of a stage in the order they run; further ones follow by name."""

RATES = {"samples/s": "samples_per_second", "tokens/s": "tokens_per_second"}
"""Of training."""


def plain_table(columns: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    """A table that scrolls sideways where it must; `columns` are escaped, `rows` are HTML."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    head = f"<thead><tr>{heads}</tr></thead>" if columns else ""
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="plain {style}">{head}{body}</table></div>'


def head_row(head: str, cells: str) -> str:
    """A row and its name, both HTML."""
    return f'<tr><th scope="row">{head}</th>{cells}</tr>'


def metrics_table(summary: Mapping[str, float | None]) -> str:
    """Every summary metric with its value and its definition in one line."""
    rows = [
        head_row(escape(name), f'<td class="number">{metric(name, summary.get(name))}</td><td>{escape(meaning)}</td>')
        for name, meaning in shown([summary]).items()
    ]
    return plain_table((), rows, "metrics")


def score_table(scores: Mapping[str, TaskScore]) -> str:
    """Score, strict score, number of questions, scorer and further metrics of each task."""
    rows = []
    for task, score in scores.items():
        parts = ", ".join(f"{name} {percent(value, 2)}" for name, value in score.metrics.items())
        numbers = (percent(score.score, 2), percent(score.strict_score, 2), score.items)
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(head_row(escape(task), f"{cells}<td>{escape(score.scorer)}</td><td>{escape(parts)}</td>"))
    return plain_table(("task", "score", "strict", "questions", "scorer", "parts"), rows)


def cost_table(stages: Sequence[StageCost]) -> str:
    """Seconds and peak memory of every step and stage, and the rates of training.

    Bars, on one scale for each of the two, show the steps' seconds and the stages' memory.
    """
    found = {step for stage in stages for step in stage.seconds}
    steps = [step for step in STEPS if step in found] + sorted(found.difference(STEPS))
    longest = max((value for stage in stages for value in stage.seconds.values()), default=0.0)
    largest = max((stage.peak_memory_bytes or 0 for stage in stages), default=0)
    rates = [(text, key) for text, key in RATES.items() if any(key in stage.training for stage in stages)]
    rows = []
    for stage in stages:
        cells = [_step_cell(stage.seconds.get(step), stage.step_memory_bytes.get(step), longest) for step in steps]
        cells.append(f'<td class="number total">{duration(sum(stage.seconds.values()))}</td>')
        cells.append(_bar_cell(memory(stage.peak_memory_bytes), stage.peak_memory_bytes or 0, largest))
        cells += [_rate_cell(stage.training.get(key)) for _, key in rates]
        rows.append(head_row(f"{stage.stage} {escape(stage.task)}", "".join(cells)))
    return plain_table(("stage", *steps, "total", "peak memory", *(text for text, _ in rates)), rows, "cost")


def settings_table(settings: Mapping[str, Any]) -> str:
    """A nested mapping as one row per leaf, keys joined by dots."""
    rows = [head_row(escape(key), f"<td>{escape(value)}</td>") for key, value in _leaves(settings)]
    return plain_table((), rows, "settings")


def _step_cell(seconds: float | None, peak: int | None, longest: float) -> str:
    if seconds is None:
        return f'<td class="number">{MISSING}</td>'
    return _bar_cell(duration(seconds), seconds, longest, "" if peak is None else memory(peak))


def _bar_cell(text: str, value: float, longest: float, below: str = "") -> str:
    width = 100 * value / longest if longest > 0 else 0.0
    small = f"<small>{escape(below)}</small>" if below else ""
    return f'<td class="number">{escape(text)}<i class="bar" style="width:{width:.1f}%"></i>{small}</td>'


def _rate_cell(rate: float | None) -> str:
    return f'<td class="number">{MISSING if rate is None else f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"}</td>'


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
