"""The page in a real browser: it loads from its file, its filters work, and texts from data stay text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from answered_runs import reference, write_answered_run
from browser import CHROMIUM, Tab, chromium
from PIL import Image

from llava_cl.report import compare_runs, load_run, write_report
from llava_cl.report.page import render_page
from llava_cl.report.timeline import timeline

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path; Debian has it: apt install chromium")

TASKS = ["Shapes", "Tones"]
ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
SHOWN = "[...document.querySelectorAll('article')].filter(card => card.checkVisibility()).map(card => card.className)"


def said(stage: int, task: int, question: int) -> str:
    """Even questions are learned and then forgotten, odd ones kept."""
    if stage <= task:
        return ATTACK
    return reference(task, question) if stage == task + 1 or question % 2 else "forgotten"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answered_run(tmp_path_factory.mktemp("run"), TASKS, 8, said, prompt=f"What is it? {ATTACK}")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report(run)


@pytest.mark.parametrize("width", [1200, 380])
@pytest.mark.parametrize("dark", [False, True])
def test_page_loads_without_a_word_and_fits(tab: Tab, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    tab.open(page, width=width, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    tab.screenshot(tmp_path / "page.png")
    with Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as shot:
        assert shot.width == width
        brightness = sum(shot.convert("L").resize((1, 1)).tobytes())
    assert (brightness < 100) == dark
    assert tab.trouble == []


def test_filter_by_what_became_of_questions(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert set(tab.run(SHOWN)) == {"forgotten", "kept"}
    tab.click(".filters label:has([value=forgotten])")
    # The second task has no later stage in which to forget.
    assert tab.run(SHOWN) == ["forgotten"] * 4
    assert tab.run("document.querySelector('output').textContent") == "4 questions"
    tab.click(".filters label:has([value=kept])")
    assert tab.run(SHOWN) == ["kept"] * (4 + 8)  # both tasks have been opened
    assert tab.trouble == []


def test_filter_by_task_and_its_address(tab: Tab, page: Path) -> None:
    tab.open(page)
    choose = "(() => {{ const pick = document.querySelector('select'); pick.value = '{}'; " + (
        "pick.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
    )
    tab.run(choose.format("Tones"))
    assert tab.run(SHOWN) == ["kept"] * 8
    assert tab.run("location.hash") == "#task=Tones&fate="
    tab.open(page, place="#task=Shapes&fate=forgotten")
    assert tab.run(SHOWN) == ["forgotten"] * 4
    tab.open(page, place="#task=Tones&fate=forgotten")
    assert tab.run(SHOWN) == []
    assert "There is no such question here." in tab.run("document.body.innerText")


def test_keyboard_alone_is_enough(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.run("document.querySelector('[name=fate]').focus()")
    tab.press("ArrowRight", 39)
    assert tab.run(SHOWN) == ["forgotten"] * 4
    tab.open(page)
    tab.run("document.querySelectorAll('details.task summary')[1].focus()")
    tab.press("Enter", 13, "\r")
    assert len(tab.run(SHOWN)) == 16


def test_texts_from_data_and_models_run_nothing(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert tab.run("window.hacked") is None
    shown = tab.run("document.querySelector('article').innerText")
    assert shown.count(ATTACK) == 2  # the question, and what the base said
    assert tab.trouble == []


def test_policy_stops_what_escaping_would_not(tab: Tab, page: Path, tmp_path: Path) -> None:
    broken = page.read_text(encoding="utf-8").replace("<main>", f"<main>{ATTACK}", 1)
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    tab.open(tmp_path / "broken.html")
    assert tab.run("window.hacked") is None
    assert any("Content Security Policy" in line for line in tab.trouble)


def test_page_without_scripts_shows_the_answers(tab: Tab, page: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page)
        assert set(tab.run(SHOWN)) == {"forgotten", "kept"}
        assert not tab.run("document.querySelector('.filters').checkVisibility()")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_page_of_a_run_under_way_reads_itself_again(tab: Tab, run: Path, tmp_path: Path) -> None:
    record = load_run(run)
    answers = timeline(record)
    page = tmp_path / "index.html"
    page.write_text(render_page(record, answers=answers, status="train 1 of 2", refresh=1), encoding="utf-8")
    tab.open(page)
    tab.run("document.querySelectorAll('details.task').forEach((part, i) => { part.open = i === 1; })")
    page.write_text(render_page(record, answers=answers, status="train 2 of 2", refresh=1), encoding="utf-8")
    tab.wait_for_load()
    assert "train 2 of 2" in tab.run("document.body.innerText")
    assert tab.run("[...document.querySelectorAll('details.task')].map(part => part.open)") == [False, True]


def test_comparison_loads(tab: Tab, run: Path, tmp_path: Path) -> None:
    page = compare_runs([run, run], tmp_path / "comparison.html")
    tab.open(page, width=380)
    assert tab.run("document.documentElement.scrollWidth") <= 380
    assert "differences" in tab.run("document.body.innerText")
    assert tab.trouble == []
