"""Curves in TensorBoard and Weights & Biases: every step and stage once, over a killed run too."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from report_runs import MATRIX, metrics, write_json, write_log, write_run

from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.pipeline.progress import Event
from llava_cl.report.tracking import Tracking, chosen_sinks

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")


def config(report_to: Any = None) -> RunConfig:
    return RunConfig.model_construct(report_to=report_to)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(run: Path, stage: str) -> list[tuple[int, float]]:
    lines = (run / "stages" / stage / "train_log.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    return [step for step, _ in found] == [step for step, _ in expected] and [value for _, value in found] == (
        pytest.approx([value for _, value in expected], rel=1e-6)
    )


def test_results_and_training_of_every_stage(tmp_path: Path) -> None:
    run = write_run(tmp_path, 6)
    with Tracking(config(), run) as tracking:
        tracking.update()
        tracking.update()
    found = scalars(run)
    assert same(found["loss/01-ImageNet-R"], logged(run, "01-ImageNet-R"))
    assert same(found["accuracy/VizWiz"], [(0, 38.39), *((stage + 1, row[2]) for stage, row in enumerate(MATRIX))])
    assert same(found["metric/MFN"], [(6, sum(MATRIX[-1]) / 6)])
    assert [step for step, _ in found["probe/captions"]] == list(range(7))
    assert same(found["seconds/train"], [(stage, 1840.0 * stage) for stage in range(1, 7)])
    assert same(found["memory/peak_GiB"], [(stage, 61 + stage / 2) for stage in range(1, 7)])
    assert same(found["basis/energy"], [(stage, 0.99) for stage in range(1, 7)])


def test_training_under_way_goes_on_after_a_kill(tmp_path: Path) -> None:
    run = write_run(tmp_path, 1)
    under_way = run / "stages" / "02-ArxivQA"
    rows = (under_way / "train_log.jsonl").read_text().splitlines(keepends=True)
    (under_way / "train_log.jsonl").unlink()
    live = under_way / "checkpoints" / "log.jsonl"
    live.parent.mkdir()
    live.write_text("".join(rows[:50]))
    Tracking(config(), run).event(Event(2, "train", 50, 90))  # killed: it is never closed
    # Resumed from step 40, so ten steps are there twice; then the stage is committed.
    live.write_text("".join([*rows[:50], *rows[40:60]]))
    with Tracking(config(), run) as tracking:
        tracking.event(Event(2, "train", 60, 90))
        live.unlink()
        (under_way / "train_log.jsonl").write_text("".join(rows))
        write_json(under_way / "stage.json", {"format": 1})
        write_json(run / "metrics.json", metrics(2))
        tracking.update()
    assert same(scalars(run)["loss/02-ArxivQA"], logged(run, "02-ArxivQA"))
    assert same(scalars(run)["accuracy/ArxivQA"], [(0, 53.73), (1, 52.43), (2, 93.8)])


def test_stages_that_are_done_again_are_logged_again(tmp_path: Path) -> None:
    run = write_run(tmp_path, 6)
    with Tracking(config(), run) as tracking:
        tracking.update()
    for stage in ("02-ArxivQA", "03-VizWiz", "04-IconQA", "05-CLEVR-Math", "06-Flickr30k"):
        shutil.rmtree(run / "stages" / stage)
    write_json(run / "metrics.json", metrics(1))
    write_log(run / "stages" / "02-ArxivQA", 5)
    with Tracking(config(), run) as tracking:
        tracking.update()
    assert json.loads((run / "logs" / "tracked.json").read_text()) == {"tensorboard": [2, 5]}


def test_a_loss_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0)
    folder = run / "stages" / "01-ImageNet-R"
    write_log(folder, 3)
    with (folder / "train_log.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": NaN, "learning_rate": 0.1}\n')
    with Tracking(config(), run) as tracking:
        tracking.update()
    assert len(scalars(run)["loss/01-ImageNet-R"]) == 3
    assert len(scalars(run)["learning_rate/01-ImageNet-R"]) == 4


def test_wandb_gets_points_with_their_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("axis", name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append(("finish",))

    def init(**arguments: Any) -> Run:
        calls.append(("init", arguments))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.Error = RuntimeError  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = write_run(tmp_path, 1)
    for _ in range(2):
        with Tracking(config(["wandb"]), run) as tracking:
            tracking.update()
    starts = [call[1] for call in calls if call[0] == "init"]
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["resume"] == "allow"
    assert ("axis", "loss/*", "step") in calls
    assert ("axis", "accuracy/*", "stage") in calls
    points = [call[1] for call in calls if call[0] == "log"]
    losses = [(point["step"], point["loss/01-ImageNet-R"]) for point in points if "loss/01-ImageNet-R" in point]
    assert losses == logged(run, "01-ImageNet-R")
    assert [point["accuracy/VizWiz"] for point in points if "stage" in point] == [38.39, 38.21]
    assert calls.count(("finish",)) == 2
    assert not (run / "tensorboard").exists()

    def refuse(**arguments: Any) -> Run:
        raise RuntimeError("no key")

    monkeypatch.setattr(module, "init", refuse)
    with (
        pytest.raises(InputError, match=r"wandb does not start \(no key\)"),
        Tracking(config(["wandb"]), run) as tracking,
    ):
        tracking.stage_begins(1, "ImageNet-R", 6)


def test_a_package_that_is_asked_for_and_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="report_to: the package wandb is not installed") as caught:
        Tracking(config(["tensorboard", "wandb"]), tmp_path)
    assert len(caught.value.problems) == 2
    assert chosen_sinks(None) == []


def test_report_to_is_no_part_of_what_a_run_is() -> None:
    from llava_cl.config import load_config

    file = Path(__file__).parents[2] / "configs" / "runs" / "playground_ucit_keeplora.yaml"
    with_it, without = load_config(file, ["report_to=[wandb]"]), load_config(file, ["report_to=[]"])
    assert with_it.identity() == without.identity() == load_config(file).identity()
    with pytest.raises(InputError, match="report_to"):
        load_config(file, ["report_to=[csv]"])


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, 1)
    with Tracking(config([]), run) as tracking:
        tracking.update()
    assert not (run / "tensorboard").exists()
    assert not (run / "logs").exists()
