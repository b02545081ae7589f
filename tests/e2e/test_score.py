"""`llava-cl score` on the reference files of all benchmark tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cl import cli

SCORERS = Path(__file__).parents[1] / "golden" / "scorers"
TASKS = {
    "ucit": ["ImageNet-R", "ArxivQA", "IconQA", "CLEVR-Math"],
    "dcl": ["RS", "Med", "AD", "Sci", "Fin"],
}


@pytest.mark.parametrize(("benchmark", "task"), [(name, task) for name, tasks in TASKS.items() for task in tasks])
def test_score_of_reference_predictions(
    benchmark: str, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SCORERS / task
    files = ["--questions", str(folder / "questions.json"), "--answers", str(folder / "answers.jsonl")]
    monkeypatch.setattr("sys.argv", ["llava-cl", "score", "--benchmark", benchmark, "--task", task, *files, "--json"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    result = json.loads(capsys.readouterr().out)
    expected = json.loads((folder / "expected.json").read_text())
    assert result["task"] == task
    assert result["score"] == pytest.approx(expected["score"], abs=1e-9)
    assert result["items"] == expected["n"]
    assert result["credits"] == {str(item["question_id"]): item["credit"] for item in expected["credits"]}


def test_unknown_task_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", "--benchmark", "ucit", "--task", "RS", "--questions", "q.json", "--answers", "a.jsonl"]
    monkeypatch.setattr("sys.argv", ["llava-cl", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "ImageNet-R" in capsys.readouterr().err


def test_captions_are_scored_without_java_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = SCORERS.parent / "captions"
    answers = tmp_path / "answers.jsonl"
    answers.write_text((folder / "answers_raw.jsonl").read_text())
    files = ["--questions", str(folder / "questions.json"), "--answers", str(answers)]
    files += ["--references", str(folder / "references.json")]
    arguments = ["llava-cl", "score", "--benchmark", "ucit", "--task", "Flickr30k", *files, "--json"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Java" in error and "apt-get install" in error and "--scorer caption_overlap" in error
    monkeypatch.setattr("sys.argv", [*arguments, "--scorer", "caption_overlap"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["scorer"] == "caption_overlap"
    assert set(result["metrics"]) == {*(f"Overlap_Bleu_{n}" for n in range(1, 5)), "Overlap_ROUGE_L"}
    assert result["score"] == pytest.approx(sum(result["metrics"].values()) / 5)


def test_an_output_that_is_full_is_one_message() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "llava_cl.cli", "methods"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output: cannot be written (No space left on device); make room")
    assert done.stderr.count("\n") == 1
