"""`llava-cl eval`: recorded answers are scored as they are, missing ones are asked again and come out the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.pipeline import orchestrator
from llava_cl.pipeline.orchestrator import Launch, evaluate
from llava_cl.store import RunDirectory
from runs import Silent, run_here, tiny_config
from tiny import run_content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def config(tiny_run: Path, folder: Path) -> RunConfig:
    return tiny_config(folder, run_content(tiny_run))


@pytest.fixture(scope="module")
def run(config: RunConfig, folder: Path) -> Path:
    """A finished run; read it, never write to it."""
    run_here(config, folder / "run")
    return folder / "run"


def test_recorded_answers_are_scored_without_a_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr(orchestrator, "run_job", refuse)
    result = CliRunner().invoke(app, ["eval", str(run), "--json"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(scores) == ["0", "1", "2"]
    rows = [[scores[stage][task]["score"] for task in ("Colour", "Tone")] for stage in ("0", "1", "2")]
    assert rows == [metrics["base_row"], *metrics["matrix"]]
    table = CliRunner().invoke(app, ["eval", str(run), "--stage", "2", "--task", "Tone"]).stdout
    assert f"{metrics['matrix'][1][1]:.2f}" in table
    assert "Colour" not in table


def test_missing_answers_are_asked(run: Path, config: RunConfig, tmp_path: Path) -> None:
    """Of a stage that is trained and was stopped before its evaluation."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "stages" / "02-Tone")
    stage = copy / "stages" / "01-Colour"
    answers = (stage / "predictions" / "Tone.jsonl").read_bytes()
    for name in ("stage.json", "predictions/Tone.jsonl", "steps/evaluate-Tone.json", "steps/evaluate.json"):
        (stage / name).unlink()
    watcher = Silent()
    result = evaluate(config, Launch(copy), watcher, stages=[1], task="Tone")
    assert watcher.begun == [1]
    assert (stage / "predictions" / "Tone.jsonl").read_bytes() == answers
    recorded = json.loads((stage / "scores.json").read_text())["scores"]["Tone"]
    assert result == {1: {"Tone": recorded}}


def test_the_base_can_be_scored_before_anything_is_trained(run: Path, config: RunConfig, tmp_path: Path) -> None:
    result = evaluate(config, Launch(tmp_path / "run"), Silent(), stages=[0], task=None)
    recorded = json.loads((run / "stages" / "00-base" / "scores.json").read_text())["scores"]
    assert result == {0: recorded}
    with pytest.raises(InputError, match=r"--stage 1: .* is trained up to stage 0"):
        evaluate(config, Launch(tmp_path / "run"), Silent(), stages=[1], task=None)
    # The run goes on from there, and does not ask again.
    before = (tmp_path / "run" / "stages" / "00-base" / "steps" / "evaluate-Tone.json").read_bytes()
    run_here(config, tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "00-base" / "steps" / "evaluate-Tone.json").read_bytes() == before


def test_an_unknown_task_is_refused(run: Path, config: RunConfig) -> None:
    with pytest.raises(InputError, match="--task Shape: tiny has Colour, Tone"):
        evaluate(config, Launch(run), Silent(), stages=None, task="Shape")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert "holds no run.json" in str(result.exception)


@pytest.mark.parametrize("command", ["run", "eval"])
def test_changed_code_is_refused_or_accepted(command: str, run: Path, folder: Path, tmp_path: Path) -> None:
    copy = RunDirectory(shutil.copytree(run, tmp_path / "run"), ())
    manifest = copy.recorded()
    copy.record({**manifest, "code": {**manifest["code"], "data/chat.py": "0"}})
    arguments = [command, str(folder / "run.yaml"), "--output", str(copy.path)]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, InputError)
    assert "has changed since, in data/chat.py. Put it back" in str(refused.exception)
    assert CliRunner().invoke(app, [*arguments, "--accept-code"]).exit_code == 0
    assert [change["files"] for change in copy.recorded()["code_changes"]] == [["data/chat.py"]]
