"""No command takes a stage that was changed, moved or brought from another run for one of the run that it reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.pipeline.export import export
from llava_cl.pipeline.orchestrator import Launch, evaluate
from llava_cl.report import load_run, write_report
from llava_cl.report.load import verified
from llava_cl.store import RunDirectory, read_json, resume_points, write_json
from runs import Silent, result_hashes, run_here, tiny_config


class Killed(BaseException):
    """Stands for a kill signal."""


FIRST, SECOND = "stages/01-Colour", "stages/02-Tone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return tiny_config(folder, tiny.run_content(folder))


@pytest.fixture(scope="module")
def run(config: RunConfig, folder: Path) -> Path:
    """A finished run; read it, never write to it."""
    run_here(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """The same stream with another seed."""
    run_here(tiny_config(folder, tiny.run_content(folder), "seed=7"), folder / "other")
    return folder / "other"


def _uncommit(run: Path, stage: str) -> None:
    """A stage that is trained, and was stopped before its end."""
    (run / stage / "stage.json").unlink()


def _swap(run: Path, other: Path) -> None:
    (run / FIRST).rename(run / "aside")
    (run / SECOND).rename(run / FIRST)
    (run / "aside").rename(run / SECOND)


def _foreign(run: Path, other: Path) -> None:
    shutil.rmtree(run / FIRST)
    shutil.copytree(other / FIRST, run / FIRST)


def _foreign_under_way(run: Path, other: Path) -> None:
    _foreign(run, other)
    shutil.rmtree(run / SECOND)
    _uncommit(run, FIRST)


def _foreign_last(run: Path, other: Path) -> None:
    """Of which not even the training is recorded."""
    shutil.rmtree(run / SECOND)
    shutil.copytree(other / SECOND, run / SECOND)
    _uncommit(run, SECOND)
    for record in (run / SECOND / "steps").glob("*.json"):
        if record.stem != "initialise":
            record.unlink()


def _foreign_base(run: Path, other: Path) -> None:
    shutil.rmtree(run / "stages/00-base")
    shutil.copytree(other / "stages/00-base", run / "stages/00-base")


def _edited(name: str, old: bytes, new: bytes) -> Callable[[Path, Path], None]:
    def damage(run: Path, other: Path) -> None:
        content = (run / name).read_bytes()
        assert old in content
        (run / name).write_bytes(content.replace(old, new))

    return damage


def _adapter(run: Path, other: Path) -> None:
    file = f"{FIRST}/adapter/adapter_model.safetensors"
    shutil.copyfile(other / file, run / file)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "swapped": _swap,
    "foreign": _foreign,
    "foreign base": _foreign_base,
    "foreign, under way": _foreign_under_way,
    "foreign, begun": _foreign_last,
    "adapter": _adapter,
    "predictions": _edited(f"{SECOND}/predictions/Tone.jsonl", b'"text": "', b'"text": "no '),
    "scores": _edited(f"{SECOND}/scores.json", b'"score":', b'"score": 1'),
    "record of scores": _edited(f"{SECOND}/steps/score.json", b'"score":', b'"score": 1'),
    "loss": _edited(f"{SECOND}/train_log.jsonl", b'"loss": ', b'"loss": 1'),
}
SAID = "in another run, than those beside it|has changed since it was recorded"


@pytest.fixture(params=DAMAGES)
def damaged(run: Path, other: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    DAMAGES[request.param](copy, other)
    return copy


def test_every_command_that_computes_refuses(damaged: Path, config: RunConfig, tmp_path: Path) -> None:
    before = result_hashes(damaged)
    watcher = Silent()
    with pytest.raises(InputError, match=SAID):
        run_here(config, damaged, watcher)
    with pytest.raises(InputError, match=SAID):
        evaluate(config, Launch(damaged), watcher, stages=None, task=None)
    for layout in ("hf", "peft"):
        with pytest.raises(InputError, match=SAID):
            export(damaged, 2, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
    assert watcher.begun == []
    assert result_hashes(damaged) == before


def test_the_report_tells_it(damaged: Path, run: Path) -> None:
    assert verified(load_run(run)).problems == ()
    problems = verified(load_run(damaged)).problems
    assert re.search(SAID, "\n".join(problems))
    assert "Damaged" in write_report(damaged).read_text()


def test_a_card_is_made_of_the_stages_and_not_of_what_was_made_of_them(run: Path, tmp_path: Path) -> None:
    """`metrics.json` and `accuracy_matrix.csv` only repeat the stages' own scores."""
    export(run, 1, tmp_path / "right", "peft")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    metrics = read_json(copy / "metrics.json")
    write_json(copy / "metrics.json", {**metrics, "matrix": [[99.99, 99.99]] * 2, "base_row": [99.99, 99.99]})
    export(copy, 1, tmp_path / "edited", "peft")
    (copy / "metrics.json").write_text("{")
    export(copy, 1, tmp_path / "broken", "peft")
    card = (tmp_path / "right" / "README.md").read_text()
    assert f"| {metrics['matrix'][0][1]:.2f} |" in card
    assert {(tmp_path / name / "README.md").read_text() for name in ("edited", "broken")} == {card}


def test_what_lies_behind_the_exported_stage_does_not_matter(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / SECOND / "scores.json").write_text("{}")
    export(copy, 1, tmp_path / "out", "peft")
    with pytest.raises(InputError, match=r"scores\.json: has changed"):
        export(copy, 2, tmp_path / "later", "peft")


def test_a_stage_under_way_is_exported_once_it_is_trained(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    _uncommit(copy, SECOND)
    export(copy, 2, tmp_path / "out", "peft")
    assert "SHA-256" in (tmp_path / "out" / "README.md").read_text()
    (copy / SECOND / "steps/train.json").unlink()
    with pytest.raises(InputError, match="is trained up to stage 1"):
        export(copy, 2, tmp_path / "later", "peft")


def test_two_exports_to_one_folder_do_not_mix(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first one writes, and ends before it."""
    from llava_cl.pipeline import export as module

    combine, calls = module.combine, []

    def in_between(adapters: list[Path], partial: Path) -> None:
        calls.append(partial)
        combine(adapters, partial)
        if len(calls) == 1:
            export(run, 2, tmp_path / "out", "peft")
            assert partial.is_dir()

    monkeypatch.setattr(module, "combine", in_between)
    with pytest.raises(InputError, match="was written meanwhile; give a new folder"):
        export(run, 1, tmp_path / "out", "peft")
    assert len({*calls}) == 2
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8, "that of two stages"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_resume_point_of_another_run_is_not_used(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = resume_points.record

    def killed(*arguments: Any) -> None:
        record(*arguments)
        raise Killed

    for name, seed in (("mine", 42), ("other", 7)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(resume_points, "record", killed)
            overrides = ("training.checkpoint_every=1", f"seed={seed}")
            run_here(tiny_config(folder, tiny.run_content(folder), *overrides), tmp_path / name)
    points = tmp_path / "mine" / FIRST / "checkpoints"
    shutil.rmtree(points)
    shutil.copytree(tmp_path / "other" / FIRST / "checkpoints", points)
    assert resume_points.resume_steps(points) == [1]
    run_here(tiny_config(folder, tiny.run_content(folder)), tmp_path / "mine", until=1)
    expected = result_hashes(run)
    assert {name: expected[name] for name in expected if not name.startswith(SECOND)} == result_hashes(
        tmp_path / "mine"
    )


def test_the_chain_is_the_same_for_all(run: Path) -> None:
    assert [stage.stage for stage in RunDirectory(run, ["Colour", "Tone"]).verified()] == [0, 1, 2]
