"""`deterministic: true` reaches every rank before CUDA starts, is off by default, and changes nothing on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from llava_cl.pipeline import worker
from llava_cl.stopping import Stopped, StopRequest
from llava_cl.store import RunDirectory
from llava_cl.subspace import linalg
from runs import result_hashes, run_here, tiny_config
from tiny import run_content

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
ON = (True, False, True, False, ":4096:8", "1")
OFF = (False, False, False, False, None, None)


def _settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        *map(os.environ.get, VARIABLES),
    )


@pytest.fixture(autouse=True)
def _back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("override", "expected"), [("name=tiny", OFF), ("deterministic=true", ON)])
def test_a_rank_is_deterministic_before_it_touches_a_gpu(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: Any, rank: int
) -> None:
    config = tiny_config(tmp_path, run_content(tiny_run), override)
    RunDirectory(tmp_path / "run", ()).record({"config": config.model_dump(mode="json")})
    seen: list[object] = []

    def init_world(**_: object) -> NoReturn:
        seen.append(_settings())
        raise Stopped

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(worker, "die_with_parent", lambda: True)
    monkeypatch.setattr(worker, "_check_command", lambda *_: None)
    monkeypatch.setattr(os, "_exit", pytest.fail)
    monkeypatch.setattr(worker, "init_world", init_world)
    monkeypatch.setattr(StopRequest, "listen", lambda *_, **__: None)
    worker.main([str(tmp_path / "run"), "1"])
    assert seen == [expected]


def test_on_a_cpu_the_bytes_are_the_same(tmp_path: Path) -> None:
    content = run_content(tmp_path)
    outputs = []
    for deterministic in (False, True):
        config = tiny_config(tmp_path, content, f"deterministic={str(deterministic).lower()}")
        outputs.append(tmp_path / str(deterministic))
        run_here(config, outputs[-1])
        assert _settings() == (ON if deterministic else OFF)
    assert result_hashes(outputs[0]) == result_hashes(outputs[1]) != {}


def test_no_sum_of_the_decompositions_runs_on_a_gpu() -> None:
    """Torch refuses `cumsum` of floating point numbers on a GPU that is to be deterministic."""
    values = torch.arange(4.0)
    assert torch.equal(linalg.running_sums(values), torch.tensor([0.0, 1, 3, 6]))
    sources = (Path(linalg.__file__).parent).glob("*.py")
    assert [file.name for file in sources if ".cumsum(" in file.read_text()] == ["linalg.py"]
