"""What processes that read data are given: pickled for each, it is all that they need and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_clip
import tiny_vit
from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.pipeline import conversations, image_classes
from llava_cl.pipeline.samples import samples_of
from llava_cl.pipeline.task_data import read_questions
from runs import tiny_config
from tiny_smolvlm import build_smolvlm

BYTES = 100_000
"""Of a tiny stream's pictures' names, records and words; its smallest model takes more."""


def _config(kind: str, folder: Path) -> RunConfig:
    content: dict[str, Any] = {"clip": tiny_clip, "vit": tiny_vit}.get(kind, tiny).run_content(folder)
    if kind == "smolvlm":
        content["model"] = {"family": kind, "path": str(build_smolvlm(folder / "smolvlm")), "dtype": "float32"}
    return tiny_config(folder, content)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "clip", "vit"])
def test_samples_are_the_same_in_a_process_that_was_started_afresh(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(kind, tmp_path)
    samples = samples_of(config)
    model = samples.family.load(torch.device("cpu"))
    samples.prepare(model)
    samples.choose(model, 1)
    task = config.task(1)
    learned = (samples.training(task, 3), samples.measured(task))
    given: list[tuple[Any, Any]] = [(data.dataset, samples.collate) for data in learned]

    def predict(_answer: Any, dataset: Any, *_: Any, collate: Any, **__: Any) -> list[str]:
        given.append((dataset, collate))
        return []

    for module in (conversations, image_classes):
        monkeypatch.setattr(module, "predict", predict)
    samples.answer(model, 1, task, read_questions(config, task), World(0, 1, torch.device("cpu")), print)
    assert len(given) == 3
    for dataset, collate in given:
        pickled = pickle.dumps((dataset, collate))
        assert len(pickled) < BYTES
        there, batch_there = pickle.loads(pickled)
        batch, copy = collate([dataset[0], dataset[1]]), batch_there([there[0], there[1]])
        assert batch.keys() == copy.keys()
        assert all(torch.equal(batch[name], copy[name]) for name in batch)
