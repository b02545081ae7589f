"""The model card of an exported model: what it was made of, how, and what it scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from llava_cl import __version__
from llava_cl.config import RunConfig
from llava_cl.pipeline.results import config_results
from llava_cl.store import RunDirectory, StageDirectory, file_hash, write_text

CARD = "README.md"
_USE = {"peft": "peft", "hf": "transformers"}


def write_card(
    folder: Path, config: RunConfig, run: RunDirectory, stages: Sequence[StageDirectory], layout: str
) -> None:
    """Writes `README.md` into the folder of an exported model, last, as it states the hashes of the files beside it.

    Args:
        folder: the exported model.
        config: the run's configuration.
        run: the run's directory.
        stages: the stages 0, 1, ... up to the one that was exported, verified.
        layout: the format that was exported.
    """
    manifest = run.recorded("base", "data")
    metrics = config_results(config, [each for each in stages if each.committed])
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stage = len(stages) - 1
    learned = [task.name for task in config.benchmark.tasks[:stage]]
    data = ModelCardData(
        library_name=_USE.get(layout),
        tags=["continual-learning", "llava-cl", config.method.name, config.benchmark.name],
    )
    base = config.model.path.name
    method = {
        "options": config.method.options,
        "parts": config.method.parts,
        "lora": config.lora.model_dump(mode="json"),
    }
    title = f"{base} after {len(learned)} of {len(config.benchmark.tasks)} tasks of {config.benchmark.name}"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(title)}",
        f"Written by `llava-cl export --format {layout}`, llava_cl {__version__}, "
        f"from the run {_code(config.name)} after stage {stage}.",
        "The licence is not stated here: it follows from those of the base model and of the data. "
        "Add `license:` to the head of this file before you publish it.",
        "## What it is made of",
        _table(
            ["", ""],
            [
                ["base model", _code(base)],
                ["its fingerprint (SHA-256)", _code(manifest["base"]["sha256"])],
                ["stream", _code(config.benchmark.name)],
                ["tasks learned, in order", ", ".join(map(_code, learned)) or "none: this is the base model"],
                ["method", _code(config.method.name)],
                ["seed", str(config.seed)],
            ],
        ),
        "Options of the method and shape of the adapters:",
        _fenced(yaml.safe_dump(method, sort_keys=False, allow_unicode=True)),
        "## What it scored",
        _scores(metrics, learned),
        "## Hashes (SHA-256)",
        "Data that the run read:",
        _hashes(manifest["data"].items()),
        "Files of this folder:",
        _hashes((file.relative_to(folder).as_posix(), file_hash(file)) for file in files),
    ]
    write_text(folder / CARD, "\n\n".join(sections) + "\n")


def _scores(metrics: Mapping[str, Any], learned: Sequence[str]) -> str:
    """The accuracy matrix up to the stage, and the metrics if the stage itself is scored."""
    rows = metrics["matrix"]
    if not (rows or metrics["base_row"]):
        return "It was not evaluated."
    base = [["base model", *metrics["base_row"]]] if metrics["base_row"] else []
    body = [*base, *([f"after {_code(task)}", *row] for task, row in zip(learned, rows, strict=False))]
    table = _table(
        ["percent", *map(_code, metrics["tasks"])],
        [[row[0], *("" if value is None else f"{value:.2f}" for value in row[1:])] for row in body],
    )
    if not metrics["summary"] or len(rows) != len(learned):
        return table
    summary = {name: value for name, value in sorted(metrics["summary"].items()) if value is not None}
    return f"{table}\n\n" + _table(list(summary), [[f"{value:.2f}" for value in summary.values()]])


def _hashes(pairs: Iterable[tuple[str, str]]) -> str:
    return _table(["file", "SHA-256"], [[_code(name), _code(digest)] for name, digest in pairs])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would read as more than text."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#&!~" else letter for letter in text if letter.isprintable())


def _code(text: str) -> str:
    """Text between backticks, in a table too."""
    return "`" + "".join(letter for letter in text if letter.isprintable()).replace("`", "'").replace("|", "\\|") + "`"


def _fenced(text: str) -> str:
    fence = "`" * (3 + text.count("`"))
    return f"{fence}yaml\n{text}{fence}"
