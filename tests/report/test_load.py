"""Reading a run directory: what is accepted, where it stands, and errors that name file and field."""

import json
import re
from pathlib import Path

import pytest
from report_runs import BASE, MATRIX, TASKS, metrics, write_json, write_run

from llava_cl.errors import InputError
from llava_cl.report import load_run
from llava_cl.report.load import parse_metrics, verified


def test_full_run_is_read_as_written(tmp_path: Path) -> None:
    record = load_run(write_run(tmp_path, 6))
    assert record.metrics.matrix == MATRIX
    assert record.metrics.base_row == BASE
    assert sorted(record.stages) == list(range(7))
    assert len(record.stages[3].losses) == 600
    assert record.scores["VizWiz"].metrics == {"CIDEr": 51.2}
    assert (record.scores_stage, record.done, record.complete, record.current) == (6, 6, True, None)


@pytest.mark.parametrize(
    ("done", "state"),
    [(0, "no stage of 6 done yet"), (2, "stage 3 of 6 under way"), (6, "complete, 6 stages")],
)
def test_state_in_words(tmp_path: Path, done: int, state: str) -> None:
    assert load_run(write_run(tmp_path, done)).state == state


def test_state_between_stages_and_during_the_base(tmp_path: Path) -> None:
    write_run(tmp_path, 6)
    for number in (5, 6):
        (tmp_path / "stages" / f"{number:02d}-{TASKS[number - 1]}").rename(tmp_path / f"gone-{number}")
    assert load_run(tmp_path).state == "stage 4 of 6 done"
    (tmp_path / "stages" / "00-base" / "stage.json").unlink()
    assert load_run(tmp_path).state == "zero-shot evaluation under way"


def test_run_without_metrics_yet_is_empty_not_wrong(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    (tmp_path / "metrics.json").unlink()
    assert load_run(tmp_path).metrics.matrix == []


def test_log_line_still_being_written_waits(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    log = tmp_path / "stages" / "03-VizWiz" / "train_log.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    losses = load_run(tmp_path).stages[3].losses
    assert list(losses) == [1, 2]
    assert losses[1] == 2.5
    assert losses[2] != losses[2]


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + r".*no run\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "stages/02-ArxivQA/scores.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": 1, ', b"\xff\xfe", b"[]", b"{}"])
def test_corrupt_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """Without run.json there is nothing to show; without others the rest is."""
    write_run(tmp_path, 2)
    (tmp_path / name).write_bytes(content)
    if name == "run.json":
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            load_run(tmp_path)
        return
    record = load_run(tmp_path)
    assert all(problem.startswith(f"{tmp_path / name}: ") for problem in record.problems)
    assert record.problems
    assert record.state == "stage 3 of 6 under way, damaged"
    assert bool(record.metrics.matrix) == (name != "metrics.json")
    assert record.scores_stage == (2 if name == "metrics.json" else 1)


def test_corrupt_log_line_is_named_with_its_number(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    log = tmp_path / "stages" / "01-ImageNet-R" / "train_log.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 3, "loss": 2.0}\n')
    record = load_run(tmp_path)
    assert record.problems == (f"{log}, line 2: field loss: field required",)
    assert list(record.stages[1].losses) == [1]
    log.unlink()
    log.mkdir()
    assert load_run(tmp_path).problems == (f"{log}: cannot be read (Is a directory)",)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    run = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "metrics.json", {**metrics(2), "matrix": [[1.0, float("nan"), 3, 4, 5, 6]], "stages": 1})
    assert re.findall(r"field [a-z.0-9]+", "\n".join(load_run(tmp_path).problems)) == [
        "field matrix.0.1",
        "field stages",
    ]
    write_json(tmp_path / "run.json", {**run, "format": 3, "ranks": "many"})
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert re.findall(r"field [a-z]+", str(caught.value)) == ["field format", "field ranks"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"matrix": [[1.0, 2.0]]}, r"field matrix\.0: 2 values for 6"),
        ({"matrix": [*MATRIX, MATRIX[0]]}, "field matrix: 7 rows for 6"),
        ({"base_row": [1.0]}, r"field base_row\.0: 1 values"),
        ({"probes": {"names": ["a"], "rows": [[1.0, 2.0]]}}, r"field probes\.rows\.0"),
        ({"probes": {"names": ["a"], "rows": [[1.0]] * 5}}, r"field probes\.rows: 5 rows for 1"),
    ],
)
def test_tables_of_the_wrong_shape(change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        parse_metrics({**metrics(1), **change})


def test_metrics_of_another_run_are_not_shown(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    write_json(tmp_path / "metrics.json", metrics(0, TASKS[::-1]))
    record = load_run(tmp_path)
    assert record.problems == (f"{tmp_path / 'metrics.json'}: field tasks: not the tasks of run.json",)
    assert record.metrics.base_row is None


@pytest.mark.parametrize("name", ["02-Other", "01-backup", "02-ArxivQA.bak", "99-x", "notes.txt"])
def test_what_is_no_stage_is_left_alone(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, 2)
    before = load_run(tmp_path)
    (tmp_path / "stages" / name).mkdir()
    (tmp_path / "stages" / name / "scores.json").write_text("{")
    assert load_run(tmp_path) == before
    assert verified(before).problems == ()
