"""Helpers for tests that run whole streams of the tiny model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from llava_cl.config import RunConfig, load_config
from llava_cl.pipeline.orchestrator import Launch, Watcher, execute
from llava_cl.pipeline.stage import stage_runner


class Silent(Watcher):
    """A watcher that only keeps the stages and the notes."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keeps it."""
        self.notes.append(text)

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        """Counts."""
        self.begun.append(stage)


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    """Writes a run file."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def run_here(
    config: RunConfig, output: Path, watcher: Silent | None = None, *, until: int | None = None
) -> dict[str, Any]:
    """Runs a stream in this process on one rank; returns the metrics."""
    return execute(
        config,
        Launch(output, until=until),
        watcher or Silent(),
        after_stage=lambda run: None,
        run_stage=stage_runner(config),
    )


def result_hashes(output: Path) -> dict[str, str]:
    """Hash of every file that must not depend on how often a run was interrupted."""
    wanted = ("*.safetensors", "adapter_config.json", "scores.json", "predictions/*.jsonl", "train_log.jsonl")
    files = {file for pattern in wanted for file in output.glob(f"stages/*/**/{pattern}")}
    files |= {file for pattern in wanted for file in output.glob(f"stages/*/{pattern}")}
    return {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def tiny_config(folder: Path, content: dict[str, Any], *overrides: str) -> RunConfig:
    """Loads a run file with overrides."""
    return load_config(write_config(folder, content), overrides)
