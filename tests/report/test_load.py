"""Reading a run directory: what is accepted, where it stands, and errors that name file and field."""

import json
import re
from pathlib import Path

import pytest
from report_runs import BASE, MATRIX, TASKS, metrics, write_json, write_run

from llava_cl.errors import InputError
from llava_cl.report import load_run
from llava_cl.report.load import parse_metrics


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
    write_run(tmp_path, 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        load_run(tmp_path)


def test_corrupt_log_line_is_named_with_its_number(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    log = tmp_path / "stages" / "01-ImageNet-R" / "train_log.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n{"step": 3, "loss": 2.0}\n')
    with pytest.raises(InputError, match=re.escape(str(log)) + ", line 2: field loss"):
        load_run(tmp_path)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    run = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "run.json", {**run, "format": 3, "ranks": "many"})
    write_json(tmp_path / "metrics.json", {**metrics(2), "matrix": [[1.0, float("nan"), 3, 4, 5, 6]]})
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    found = "\n".join(caught.value.problems)
    assert "field format" in found
    assert "field ranks" in found
    assert "field matrix.0.1" in found


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


def test_metrics_of_another_run_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 0)
    write_json(tmp_path / "metrics.json", metrics(0, TASKS[::-1]))
    with pytest.raises(InputError, match=r"not the tasks of run\.json"):
        load_run(tmp_path)


def test_two_folders_of_one_stage_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    (tmp_path / "stages" / "02-Other").mkdir()
    with pytest.raises(InputError, match="stage 2 has several folders"):
        load_run(tmp_path)
