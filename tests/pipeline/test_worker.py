"""What a rank reports of its failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.pipeline import worker
from llava_cl.pipeline.launch import failure_file


def test_a_gpu_without_memory_says_which_batches_to_halve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(worker, "recorded_config", full)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "setup_logging", lambda rank: None)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        worker.main([str(tmp_path), "1"])
    report = json.loads(failure_file(tmp_path, 3).read_text())
    assert report["explained"] and report["exit_code"] == 1
    for part in ("training.micro_batch", "measurement.batch_size", "evaluation.batch_size", "2.00 GiB."):
        assert part in report["message"]
