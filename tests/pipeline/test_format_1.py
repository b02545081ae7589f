"""A run that the version before began (format 1, commit 9080dd44): stages 0 and 1 of two, its model and its data."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from llava_cl.cli import app
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.pipeline.export import export
from llava_cl.pipeline.orchestrator import Launch, evaluate, execute
from llava_cl.pipeline.stage import stage_runner
from llava_cl.store import RunDirectory, read_json
from runs import Silent, result_hashes, tiny_config

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_of_format_1.tar.xz"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


@pytest.fixture
def config(run: Path) -> RunConfig:
    """Its data and its model are in another place than they were."""
    return tiny_config(run.parent, tiny.run_content(run.parent))


def _go_on(config: RunConfig, run: Path, watcher: Silent, *, accept_code: bool = True) -> None:
    launch = Launch(run, accept_code=accept_code)
    execute(config, launch, watcher, after_stage=lambda run: None, run_stage=stage_runner(config))


def test_it_is_shown(run: Path) -> None:
    before = read_json(run / "metrics.json")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    page = (run / "report" / "index.html").read_text()
    assert "stage 1 of 2 done</title>" in page
    assert "Damaged" not in page
    assert f"{before['matrix'][0][0]:.1f}" in page


def test_it_is_refused_with_what_to_do_or_goes_on(run: Path, config: RunConfig) -> None:
    before = result_hashes(run)
    with pytest.raises(InputError, match=r"the code of llava_cl has changed .* or go on with --accept-code"):
        _go_on(config, run, Silent(), accept_code=False)
    watcher = Silent()
    _go_on(config, run, watcher)
    assert watcher.begun == [2]
    assert before.items() <= result_hashes(run).items()
    manifest = RunDirectory(run, ()).recorded()
    assert manifest["format"] == 1
    assert manifest["config"]["model"]["path"] == str(config.model.path)
    again = Silent()
    _go_on(config, run, again, accept_code=False)
    assert again.begun == []
    assert len(read_json(run / "metrics.json")["matrix"]) == 2


def test_its_models_are_scored_and_exported(run: Path, config: RunConfig, tmp_path: Path) -> None:
    recorded = read_json(run / "stages/01-Colour/scores.json")["scores"]
    found = evaluate(config, Launch(run, accept_code=True), Silent(), stages=[1], task=None)
    assert {task: own["score"] for task, own in found[1].items()} == {t: own["score"] for t, own in recorded.items()}
    for layout in ("hf", "peft"):
        export(run, 1, tmp_path / layout, layout)
        assert (tmp_path / layout / "README.md").is_file()


@pytest.mark.parametrize("name", ["model/model.safetensors", "data/Tone/test.json"])
def test_another_model_or_other_data_are_refused(run: Path, config: RunConfig, name: str) -> None:
    file = run.parent / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"holds another run|cannot be|not valid"):
        _go_on(config, run, Silent())
