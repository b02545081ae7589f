"""The page of a run under way: it is there from the first stage on, says what goes on, and stops at the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from answered_runs import reference, write_answered_run
from report_html import check_page
from report_runs import write_log

from llava_cl.pipeline.progress import Event
from llava_cl.report import live_page, write_report
from llava_cl.report.live_page import LivePage
from llava_cl.stopping import Stopped

TASKS = ["Shapes", "Tones"]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event may write the page, however long the last time took."""
    monkeypatch.setattr(live_page, "MOST_OF_THE_TIME", math.inf)


def text_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_page_follows_a_stage(tmp_path: Path, unhurried: None) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: reference(task, i), stages=1)
    live = run / "stages" / "02-Tones" / "checkpoints"
    with LivePage(run, seconds=0) as page:
        page.stage_begins(2, "Tones", 2)
        assert "Stage 1 of 2 done: stage 2 starts" in text_of(run)
        write_log(live, 7)
        (live / "train_log.jsonl").rename(live / "log.jsonl")
        page.event(Event(2, "train", 7, 90))
        html = text_of(run)
        check_page(html)
        assert "Stage 2 of 2 under way: train 7 of 90" in html
        assert "2 Tones: training loss by step" in html
        assert 'data-refresh="20"' in html
        assert "<article" in html
    assert "data-refresh" not in text_of(run)
    assert "train 7 of 90" not in text_of(run)


def test_page_of_a_complete_run_is_that_of_the_command(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: reference(task, i))
    with LivePage(run) as page:
        page.committed()
    live = text_of(run)
    assert write_report(run).read_text(encoding="utf-8") == live


def test_answers_are_read_again_when_a_stage_is_done(tmp_path: Path, unhurried: None) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: f"said after {stage}", stages=1)
    page = LivePage(run, seconds=0)
    page.stage_begins(2, "Tones", 2)
    write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: f"said after {stage}")
    page.event(Event(2, "score", 0, 0))
    assert "said after 2" not in text_of(run)
    page.committed()
    assert "said after 2" in text_of(run)


@pytest.mark.parametrize(
    ("failure", "said"),
    [(RuntimeError(), "failed"), (Stopped(2, "stopped"), "stopped"), (KeyboardInterrupt(), "failed")],
)
def test_a_run_that_ends_early_says_so(tmp_path: Path, failure: BaseException, said: str) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: reference(task, i), stages=1)
    for begun, state in ((False, f"Stage 1 of 2 done, then {said}"), (True, f"Stage 2 of 2 {said}")):
        with pytest.raises(type(failure)), LivePage(run) as page:
            page.stage_begins(2, "Tones", 2)
            if begun:
                write_log(run / "stages" / "02-Tones", 7)
            raise failure
        html = text_of(run)
        assert f'<p class="state">{state}</p>' in html
        assert 'data-refresh="' not in html


def test_what_fails_before_a_stage_leaves_the_page(tmp_path: Path) -> None:
    """The folder can hold another run."""
    run = write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: reference(task, i), stages=1)
    with pytest.raises(RuntimeError), LivePage(run):
        raise RuntimeError
    assert not (run / "report").exists()


def test_nothing_is_written_where_there_is_no_run(tmp_path: Path) -> None:
    with LivePage(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
