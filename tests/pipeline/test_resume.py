"""A run that is interrupted at any step and started again ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

import tiny
from llava_cl import __version__
from llava_cl.errors import InputError, RunError
from llava_cl.pipeline import stage as stages
from llava_cl.pipeline import steps
from llava_cl.pipeline.orchestrator import Launch, execute
from llava_cl.pipeline.stage import stage_runner
from llava_cl.store import RunDirectory, file_hash, read_json, write_json
from llava_cl.store.fingerprint import fingerprint_code
from runs import Silent, result_hashes, run_here, tiny_config

STEPS = {"initialise": "initialise", "train": "learn", "protect": "protect", "evaluate": "evaluate", "score": "score"}


class Killed(BaseException):
    """Stands for a kill signal: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    run_here(tiny_config(folder, tiny.run_content(folder)), folder / "undisturbed")
    return folder / "undisturbed"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_step_is_repeated_and_nothing_else(
    folder: Path, undisturbed: Path, step: str, when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`before` = files of the step are not yet written; `after` = written, but not recorded."""
    output = tmp_path / "run"
    for part in ("run.json", "stages/00-base", "stages/01-Colour"):
        source = undisturbed / part
        target = output / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    original = getattr(steps, STEPS[step])

    def interrupted(job: object, stage: int) -> list[Path]:
        if when == "after":
            original(job, stage)
        raise Killed

    config = tiny_config(folder, tiny.run_content(folder))
    with monkeypatch.context() as patch:
        table = stages._LEARNING if step in stages._LEARNING else stages._EVALUATION
        patch.setitem(table, step, interrupted)
        with pytest.raises(Killed):
            run_here(config, output)
    assert not (output / "stages/02-Tone/stage.json").exists()
    done = sorted(file.stem for file in (output / "stages/02-Tone/steps").glob("*.json"))
    times = {name: (output / "stages/02-Tone/steps" / f"{name}.json").stat().st_mtime_ns for name in done}
    assert step not in done
    run_here(config, output)
    assert result_hashes(output) == result_hashes(undisturbed)
    assert {name: (output / "stages/02-Tone/steps" / f"{name}.json").stat().st_mtime_ns for name in done} == times, (
        "a recorded step was done again"
    )


def test_complete_run_does_nothing_again(folder: Path, undisturbed: Path) -> None:
    watcher = Silent()
    run_here(tiny_config(folder, tiny.run_content(folder)), undisturbed, watcher)
    assert watcher.begun == []


def test_results_files(undisturbed: Path) -> None:
    metrics = read_json(undisturbed / "metrics.json")
    assert [len(row) for row in metrics["matrix"]] == [2, 2]
    assert set(metrics["stages"][1]["seconds"]) >= {"load", "measure", "initialise", "train", "remeasure", "protect"}
    for stage in metrics["stages"]:
        peaks = stage["step_memory_bytes"]
        assert peaks.keys() == stage["seconds"].keys()
        assert 0 < max(peaks.values()) <= stage["peak_memory_bytes"]
    rates = metrics["stages"][1]["training"]
    assert rates["tokens_per_second"] > rates["samples_per_second"] > 0
    assert [stage["loads"] for stage in metrics["stages"]] == [1, 1, 1]
    layer = metrics["stages"][1]["basis"]["model.language_model.layers.0.self_attn.q_proj"]
    before = metrics["stages"][0]["basis"]["model.language_model.layers.0.self_attn.q_proj"]
    assert layer["columns"] == before["columns"] + layer["added"]
    assert (undisturbed / "accuracy_matrix.csv").read_text().splitlines()[0] == "after stage,Colour,Tone"


def test_changed_configuration_is_refused_with_what_changed(folder: Path, undisturbed: Path) -> None:
    before = result_hashes(undisturbed)
    config = tiny_config(folder, tiny.run_content(folder), "training.learning_rate=0.1")
    with pytest.raises(
        InputError, match=r"- identity\.training\.learning_rate: 0\.005\n\+ identity\.training\.learning_rate: 0\.1\n"
    ):
        run_here(config, undisturbed)
    assert result_hashes(undisturbed) == before


def test_what_the_deepspeed_file_says_of_results_is_part_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = tmp_path / "deepspeed.json", tmp_path / "run"
    config = tiny_config(folder, tiny.run_content(folder), f"distributed.deepspeed={file}")

    def run(settings: dict[str, object], place: Path = output) -> list[str]:
        file.write_text(json.dumps(settings))
        watcher = Silent()
        run_here(config, place, watcher, until=0)
        return watcher.notes

    run({"zero_optimization": {"stage": 2}, "communication_data_type": "fp16"})
    recorded = read_json(output / "run.json")["identity"]["deepspeed"]
    assert recorded == {"communication_data_type": "fp16"}
    run({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e6}, "communication_data_type": "fp16"})
    with pytest.raises(InputError, match=r'- identity\.deepspeed\.communication_data_type: "fp16"\n\+ identity\.deep'):
        run({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}})
    # An earlier version recorded only that there is a file.
    with monkeypatch.context() as patch:
        patch.setattr("llava_cl.pipeline.orchestrator.result_settings", lambda path: path is not None)
        run({}, tmp_path / "earlier")
    assert "did not record what its DeepSpeed file says" in run({"prescale_gradients": True}, tmp_path / "earlier")[0]
    alone = tiny_config(folder, tiny.run_content(folder))
    with pytest.raises(InputError, match=r"- identity\.deepspeed: true\n\+ identity\.deepspeed: false"):
        run_here(alone, tmp_path / "earlier")


def test_changed_data_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    content = tiny.run_content(folder)
    shutil.copytree(folder / "data", tmp_path / "data")
    file = tmp_path / "data" / "Tone" / "test.json"
    file.write_text(file.read_text().replace("grey", "dark"))
    with pytest.raises(InputError, match=r"Tone/test\.json"):
        run_here(tiny_config(folder, {**content, "data_root": str(tmp_path / "data")}), undisturbed)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_changed_picture_is_told_with_its_task(folder: Path, undisturbed: Path, tmp_path: Path, split: str) -> None:
    content = tiny.run_content(folder)
    shutil.copytree(folder / "data", tmp_path / "data")
    config = tiny_config(folder, {**content, "data_root": str(tmp_path / "data")})
    (tmp_path / "data" / "images" / "Tone" / "unused.png").write_bytes(b"named by no record")
    run_here(config, undisturbed)
    record = json.loads((tmp_path / "data" / "Tone" / f"{split}.json").read_text())[-1]
    picture = tmp_path / "data" / "images" / record["image"]
    other = next(
        file for file in (tmp_path / "data/images/Colour").iterdir() if file.read_bytes() != picture.read_bytes()
    )
    shutil.copyfile(other, picture)
    with pytest.raises(InputError, match=r'- data\.Tone: pictures: "[0-9a-f]{64}"\n\+ data\.Tone: pictures: "'):
        run_here(config, undisturbed)
    picture.unlink()
    with pytest.raises(InputError, match=rf"image {picture}: cannot be read \(No such file"):
        run_here(config, undisturbed)


def test_damaged_adapter_is_named_and_never_used(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "stages" / "02-Tone")
    file = output / "stages" / "01-Colour" / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: has changed since it was recorded"):
        run_here(tiny_config(folder, tiny.run_content(folder)), output)
    assert not (output / "stages" / "02-Tone").exists()


def test_redo_sets_the_damaged_stage_aside_and_gives_the_same_bytes(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    file = output / "stages/01-Colour/subspace.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    config = tiny_config(folder, tiny.run_content(folder))
    with pytest.raises(InputError, match=r"01-Colour/subspace\.safetensors: has changed .*--redo 1"):
        run_here(config, output)
    watcher = Silent()
    execute(
        config,
        Launch(output, redo=1),
        watcher,
        after_stage=lambda run: None,
        run_stage=stages.stage_runner(config),
    )
    assert watcher.begun == [1, 2]
    assert "discarded/1/01-Colour" in watcher.notes[0]
    assert (output / "discarded/1/02-Tone/stage.json").is_file()
    assert result_hashes(output) == result_hashes(undisturbed)


def test_a_redo_that_is_stopped_goes_on_with_the_same_command(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    config, launch = tiny_config(folder, tiny.run_content(folder)), Launch(output, redo=1)
    rows: list[int] = []

    def redo(watcher: Silent, stop_in: int | None) -> None:
        def run_stage(run: RunDirectory, stage: int) -> None:
            rows.append(len(read_json(run.metrics)["matrix"]))
            if stage == stop_in:
                raise Killed
            stage_runner(config)(run, stage)

        execute(config, launch, watcher, after_stage=lambda run: None, run_stage=run_stage)

    first, second, third = Silent(), Silent(), Silent()
    with pytest.raises(Killed):
        redo(first, 2)
    assert first.begun == [1, 2]
    assert rows == [0, 1], "results of stages that are set aside"
    redo(second, None)
    assert second.begun == [2]
    assert "stage 1 is being done again already" in second.notes[0]
    assert result_hashes(output) == result_hashes(undisturbed)
    with pytest.raises(Killed):
        redo(third, 1)
    assert "discarded/2/01-Colour" in third.notes[0]


def test_every_stored_file_is_covered_by_a_hash(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One flipped bit in any file of a committed stage is found, whichever file it is, and named."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    directory = RunDirectory(output, ["Colour", "Tone"])
    files = sorted(file for file in (output / "stages/01-Colour").rglob("*") if file.is_file())
    assert len(files) > 12
    for file in files:
        intact = file.read_bytes()
        content = bytearray(intact)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(InputError, match="--redo [12]|not valid JSON|" + file.name):
            directory.verified()
        file.write_bytes(intact)
    assert [stage.stage for stage in directory.verified()] == [0, 1, 2]


def test_another_version_of_the_package_is_refused(
    folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cl.pipeline.orchestrator.__version__", "99.0")
    with pytest.raises(InputError, match=rf'- llava_cl: "{__version__}"\n\+ llava_cl: "99\.0"\n'):
        run_here(tiny_config(folder, tiny.run_content(folder)), undisturbed)


def test_a_changed_manifest_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    manifest = bytearray((output / "run.json").read_bytes())
    manifest[manifest.index(b'"seed": ') + 8] ^= 1
    (output / "run.json").write_bytes(manifest)
    with pytest.raises(InputError, match=r"run\.json: has changed since it was recorded"):
        run_here(tiny_config(folder, tiny.run_content(folder)), output)


def _other_code(output: Path, *names: str) -> None:
    """Lets a run have been made with other source files."""
    run = RunDirectory(output, ())
    manifest = run.recorded()
    run.record({**manifest, "code": {**manifest["code"], **dict.fromkeys(names, "0")}})


def test_changed_code_is_refused_or_accepted_and_kept(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    output, watcher = tmp_path / "run", Silent()
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "stages" / "02-Tone")
    _other_code(output, "training/trainer.py", "data/chat.py", "methods/olora.py")
    config = tiny_config(folder, tiny.run_content(folder))
    with pytest.raises(InputError, match=r"llava_cl has changed since, in data/chat\.py, training/trainer\.py\. Put"):
        run_here(config, output)
    assert "code_changes" not in read_json(output / "run.json")
    launch = Launch(output, accept_code=True)
    execute(config, launch, watcher, after_stage=lambda run: None, run_stage=stage_runner(config))
    assert watcher.begun == [2]
    assert "goes on with other code of llava_cl" in watcher.notes[0]
    kept = read_json(output / "run.json")["code_changes"]
    assert [change["files"] for change in kept] == [["data/chat.py", "training/trainer.py"]]
    run_here(config, output)
    assert read_json(output / "run.json")["code_changes"] == kept


def test_code_that_changes_while_a_run_goes_on_ends_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage's ranks load the code from the disk."""
    config, watcher = tiny_config(folder, tiny.run_content(folder)), Silent()

    def run_job(path: Path, stage: int, **_: object) -> None:
        stage_runner(config)(RunDirectory(path, [task.name for task in config.benchmark.tasks]), stage)
        code = {**fingerprint_code(config), "data/chat.py": "0"}
        monkeypatch.setattr("llava_cl.pipeline.orchestrator.fingerprint_code", lambda config: code)

    monkeypatch.setattr("llava_cl.pipeline.orchestrator.run_job", run_job)
    with pytest.raises(InputError, match=r"has changed since, in data/chat\.py\."):
        execute(config, Launch(tmp_path / "run"), watcher, after_stage=lambda run: None)
    assert (tmp_path / "run/stages/00-base/stage.json").is_file()
    assert not (tmp_path / "run/stages/01-Colour").exists()


def test_another_version_of_torch_is_told_and_the_run_goes_on(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    found = read_json(output / "run.json")["environment"]
    monkeypatch.setattr("llava_cl.pipeline.orchestrator.versions", lambda: {**found, "torch": "99.0"})
    watcher = Silent()
    run_here(tiny_config(folder, tiny.run_content(folder)), output, watcher)
    assert [note.splitlines()[1:] for note in watcher.notes] == [[f'- torch: "{found["torch"]}"', '+ torch: "99.0"']]


def test_changed_base_model_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    content = tiny.run_content(folder)
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    content["model"]["path"] = str(tmp_path / "model")
    with pytest.raises(InputError, match=r'- base: "[0-9a-f]{64}"\n\+ base: "'):
        run_here(tiny_config(folder, content), undisturbed)


def test_a_second_run_on_the_directory_is_refused(folder: Path, undisturbed: Path) -> None:
    watcher = Silent()
    refused = pytest.raises(InputError, match="another run is working on this directory")
    with RunDirectory(undisturbed, []).locked(), refused:
        run_here(tiny_config(folder, tiny.run_content(folder)), undisturbed, watcher)
    assert watcher.begun == []


def test_a_disk_that_runs_full_is_named_and_what_was_complete_stays(
    folder: Path, undisturbed: Path, small_file_system: Path
) -> None:
    """A filler leaves room for stage 0 and a part of stage 1; when it is gone the same command ends the run."""
    config = tiny_config(folder, tiny.run_content(folder))
    output, filler = small_file_system / "run", small_file_system / "filler"
    run_here(config, output, until=0)
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - 60_000)
    with pytest.raises(RunError, match=r"stages/01-Colour/.*: cannot be written .*MB are free there"):
        run_here(config, output)
    assert (output / "stages/00-base/stage.json").is_file()
    assert not list(output.rglob(".*.tmp"))
    filler.unlink()
    run_here(config, output)
    assert result_hashes(output) == result_hashes(undisturbed)


def test_stage_redone_with_the_same_result_keeps_later_stages(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "stages" / "01-Colour")
    watcher = Silent()
    run_here(tiny_config(folder, tiny.run_content(folder)), output, watcher)
    assert watcher.begun == [1]
    assert result_hashes(output) == result_hashes(undisturbed)


def test_stage_that_follows_another_result_is_refused(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A later stage was trained on top of the earlier one's adapter, so it cannot stay when that is another."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    stage = output / "stages" / "01-Colour"
    log, manifest = stage / "train_log.jsonl", read_json(stage / "stage.json")
    log.write_text(log.read_text() + "{}\n")
    manifest["files"]["train_log.jsonl"] = file_hash(log)
    write_json(stage / "stage.json", manifest)
    with pytest.raises(InputError, match=r"02-Tone: was computed after other earlier stages"):
        run_here(tiny_config(folder, tiny.run_content(folder)), output)


def test_what_changes_speed_alone_may_change(folder: Path, undisturbed: Path) -> None:
    overrides = ["training.micro_batch=1", "evaluation.batch_size=2", "name=other", "distributed.ranks=2"]
    run_here(tiny_config(folder, tiny.run_content(folder), *overrides), undisturbed)


def test_a_run_of_an_earlier_version_goes_on(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    """An option that the recorded configuration does not know has its default there."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    manifest = RunDirectory(output, ()).recorded()
    del manifest["config"]["evaluation"]["caption_scorer"]
    RunDirectory(output, ()).record(manifest)
    watcher = Silent()
    run_here(tiny_config(folder, tiny.run_content(folder)), output, watcher)
    assert watcher.begun == []
    with pytest.raises(InputError, match=r'\+ identity\.evaluation\.caption_scorer: "caption_overlap"'):
        run_here(tiny_config(folder, tiny.run_content(folder), "evaluation.caption_scorer=caption_overlap"), output)


def test_a_run_killed_before_its_report_was_written_writes_it_when_run_again(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    reported: list[Path] = []
    config = tiny_config(folder, tiny.run_content(folder))
    execute(config, Launch(output), Silent(), after_stage=lambda run: reported.append(run.path))
    assert reported == [output.resolve()]
