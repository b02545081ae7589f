"""The answer time-line: fates, the sample, what is shown of it, and its size."""

from __future__ import annotations

import base64
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from answered_runs import manifest, reference, write_answered_run, write_predictions
from PIL import Image
from report_html import check_page
from report_runs import write_json

from llava_cl.report import load_run, write_report
from llava_cl.report.histories import MOST_QUESTIONS, PER_TASK, Fate, fate, read_histories
from llava_cl.report.questions import MOST_BYTES, SIDE, small_picture
from llava_cl.report.timeline import MOST_CHARACTERS, timeline
from llava_cl.store import RunDirectory

TASKS = ["Shapes", "Tones", "Sounds"]


def said(stage: int, task: int, question: int) -> str:
    """Four kinds of questions by their number: forgotten after a stage, kept, gained a stage later, never right."""
    learned = task + 1
    right = reference(task, question)
    if stage < learned:
        return f"guess {stage}"
    kind = question % 4
    if kind == 0:
        return right if stage == learned else f"lost {stage}"
    if kind == 1:
        return right
    return right if kind == 2 and stage > learned else "wrong"


def test_fates() -> None:
    for rights in itertools.product([False, True], repeat=4):
        now = fate(rights)
        assert (now in (Fate.KEPT, Fate.GAINED)) == rights[-1]
        assert (now is Fate.KEPT) == (rights[0] and rights[-1])
        assert (now is Fate.NEVER) == (not any(rights))
    assert fate([]) is Fate.AHEAD


def test_histories_are_what_was_scored_and_said(tmp_path: Path) -> None:
    record = load_run(write_answered_run(tmp_path, TASKS, 40, said))
    first, second, third = read_histories(record)
    assert first.fates == {Fate.FORGOTTEN: 10, Fate.KEPT: 10, Fate.GAINED: 10, Fate.NEVER: 10}
    assert second.fates == first.fates
    # The last task has no later stage in which to forget or gain.
    assert third.fates == {Fate.KEPT: 20, Fate.NEVER: 20}
    for number, history in enumerate((first, second, third)):
        assert history.learned == number + 1
        assert history.stages == (0, 1, 2, 3)
        assert len(history.sample) == PER_TASK
        assert {one.fate for one in history.sample} == set(history.fates)
        for one in history.sample:
            question = int(one.id[1:])
            texts = [said(stage, number, question) for stage in range(4)]
            assert [answer.text for answer in one.said] == texts
            assert [answer.credit for answer in one.said] == [float(t == reference(number, question)) for t in texts]


def test_sample_stays_while_the_run_goes_on(tmp_path: Path) -> None:
    """A question whose fate does not change is not exchanged for another one."""
    earlier = load_run(write_answered_run(tmp_path / "a", TASKS, 200, said, stages=2))
    later = load_run(write_answered_run(tmp_path / "b", TASKS, 200, said))
    before, after = (read_histories(record)[0].sample for record in (earlier, later))
    assert [one.id for one in before] == [one.id for one in after]


def test_tasks_ahead_are_shown_as_such(tmp_path: Path) -> None:
    record = load_run(write_answered_run(tmp_path, TASKS, 8, said, stages=1))
    assert read_histories(record)[2].fates == {Fate.AHEAD: 8}


def test_card_shows_question_picture_reference_and_answers(tmp_path: Path) -> None:
    html = write_report(write_answered_run(tmp_path, TASKS, 4, said)).read_text(encoding="utf-8")
    check_page(html)
    part = re.search(r'data-task="Shapes".*?</details>', html, re.S)
    assert part
    assert "<b>25%</b> learned, then forgotten" in part.group()
    card = next(
        each for each in re.findall(r"<article.*?</article>", part.group(), re.S) if 'class="forgotten"' in each
    )
    assert "<bdi>answer 0.0</bdi>" in card
    assert 'alt="picture of the question"' in card
    lines = re.findall(r'<li class="(.*?)"><span>(.*?)</span><b.*?>(.*?)</b><p><bdi>(.*?)</bdi>', card)
    assert lines == [
        ("wrong", "base", "✗", "guess 0"),
        ("right learned", "1", "✓", "answer 0.0"),
        ("wrong", "2", "✗", "lost 2"),
        ("wrong", "3", "✗", "lost 3"),
    ]
    assert re.findall(r'<i( class="learned")? style="--c:(\d)">', card) == [
        ("", "0"),
        (' class="learned"', "1"),
        ("", "0"),
        ("", "0"),
    ]


def test_stages_that_say_the_same_share_a_line(tmp_path: Path) -> None:
    html = timeline(load_run(write_answered_run(tmp_path, TASKS, 4, lambda stage, task, i: "same")))
    part = re.findall(r"<details.*?</details>", html, re.S)[1]
    assert re.findall(r"<li[^>]*><span>(.*?)</span>", part)[:2] == ["base–1", "2–3"]  # it was learned in stage 2


def test_captions_show_their_score_and_count_by_the_tasks_scale(tmp_path: Path) -> None:
    points = {"good": 0.5, "fair": 0.3, "poor": 0.1}

    def caption(stage: int, task: int, question: int) -> str:
        return ("good", "fair")[stage > 1] if question % 2 else ("good", "poor")[stage > 1]

    run = write_answered_run(
        tmp_path, TASKS[:2], 10, caption, scorer="caption_overlap", credit=lambda text, right: points[text]
    )
    history = read_histories(load_run(run))[0]
    assert history.graded
    assert history.scale == 0.5
    assert history.fates == {Fate.KEPT: 5, Fate.FORGOTTEN: 5}
    html = timeline(load_run(run))
    assert '<li class="right learned"><span>1</span><b>50</b>' in html
    assert '<li class="wrong"><span>2</span><b>10</b>' in html
    assert "--c:0.6" in html  # 0.3 of 0.5


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "test"):
        for folder in ("0", "1"):
            (data / split / folder).mkdir(parents=True)
            # As the embedded streams have it, the pictures are links to files elsewhere below the data root.
            Image.new("RGB", (20, 30), "red").save(data / f"{split}{folder}.png")
            (data / split / folder / "x.png").symlink_to(data / f"{split}{folder}.png")
    task = {
        "name": "Birds",
        "train": "train",
        "test": "test",
        "classes": ["0", "1"],
        "names": {"0": "wren", "1": "owl"},
    }
    RunDirectory(run, ()).record(manifest(data, [task]))
    folder = run / "stages" / "01-Birds"
    rows = [{"question_id": f"{name}/x.png", "prompt": "", "text": "1"} for name in "01"]
    write_predictions(folder / "predictions" / "Birds.jsonl", rows)
    credits = {"0/x.png": 0.0, "1/x.png": 1.0}
    score = {"scorer": "exact", "score": 50.0, "items": 2, "credits": credits}
    write_json(folder / "scores.json", {"scores": {"Birds": score}})
    write_json(folder / "stage.json", {})
    html = timeline(load_run(run))
    assert "<span>reference</span> <bdi>wren</bdi>" in html
    assert html.count("<p><bdi>owl</bdi></p>") == 2
    assert html.count("<img") == 2


def test_data_that_are_gone_leave_the_answers(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, said)
    (tmp_path / "data" / "0.json").unlink()
    (tmp_path / "data" / "images" / "1.png").write_bytes(b"no picture")
    html = write_report(run).read_text(encoding="utf-8")
    check_page(html)
    assert "Pictures and reference answers are incomplete" in html
    assert "0.json" in html
    assert "lost 3" in html
    assert "no picture" in html
    assert html.count("<img") == 2 * 3


def test_predictions_that_are_gone_leave_the_fates(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path, TASKS, 4, said)
    for file in run.glob("stages/*/predictions/*.jsonl"):
        file.unlink()
    html = timeline(load_run(run))
    assert "<b>25%</b> learned, then forgotten" in html
    assert "<article" not in html
    assert "<form" not in html


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\ud800 half", "a\0b"])
def test_hostile_texts_stay_text(tmp_path: Path, text: str) -> None:
    run = write_answered_run(tmp_path, TASKS[:1], 3, lambda stage, task, i: text, prompt=text)
    html = write_report(run).read_text(encoding="utf-8")
    check_page(html)
    assert "onerror=alert(1)>" not in html


def test_long_texts_are_cut(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path, TASKS[:1], 1, lambda stage, task, i: "&" * 5000)
    shown = re.search(r"<p><bdi>(.*?)</bdi></p>", timeline(load_run(run)))
    assert shown
    assert shown.group(1) == "&amp;" * (MOST_CHARACTERS - 1) + "…"


def test_a_picture_of_16_bits_is_as_the_model_sees_it(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x8040, np.uint16)).save(tmp_path / "grey.png")
    uri = small_picture("grey.png", tmp_path).uri
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as shown:
        assert np.asarray(shown) == pytest.approx(0x80, abs=2)


def test_pictures_are_small(tmp_path: Path) -> None:
    write_answered_run(tmp_path, TASKS[:1], 1, said, pictures=1)  # noise, the worst case
    picture = small_picture("0.png", tmp_path / "data" / "images")
    assert (picture.width, picture.height) == (SIDE, SIDE * 3 // 4)
    assert len(picture.uri) < MOST_BYTES * 4 / 3 + 30


def test_page_of_a_large_run_is_below_15_megabytes(tmp_path: Path) -> None:
    """Twenty tasks of 3,000 questions, all fates, long answers that change after every stage, pictures of noise."""
    tasks = [f"Task{number}" for number in range(1, 21)]

    def rambling(stage: int, task: int, question: int) -> str:
        text = said(stage, task, question)
        return text if question % 4 == 1 else f"{text} {stage} " + "<long answer> & more " * 40

    def credit(text: str, right: str) -> float:
        return float(text.startswith(right))

    run = write_answered_run(tmp_path, tasks, 3000, rambling, credit=credit, told=PER_TASK)
    page = write_report(run)
    html = page.read_text(encoding="utf-8")
    assert html.count("3000 questions") == 20
    assert html.count("<article") == html.count("<img") == 20 * PER_TASK <= MOST_QUESTIONS
    assert html.count("<li class=") > 21 * 60
    assert page.stat().st_size < 15e6
