"""The answer time-line: test questions with their pictures, and what the model said to them after every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from llava_cl.errors import InputError
from llava_cl.report.histories import Fate, History, TaskHistory, read_histories
from llava_cl.report.load import RunRecord
from llava_cl.report.questions import Question, Questions
from llava_cl.report.text import escape

MOST_CHARACTERS = 400
"""Of one text; longer ones are cut."""
LONG = 9
"""A list of more answers scrolls."""

_CLASSES = {fate: fate.name.lower() for fate in Fate}


def timeline(record: RunRecord) -> str:
    """One part for each task, with filters; empty before the first evaluation. All texts are escaped."""
    try:
        histories = read_histories(record)
    except InputError as error:
        return f'<p class="note">Not shown: {escape("; ".join(error.problems))}</p>'
    if not histories:
        return ""
    questions = Questions(record)
    numbers = {task: str(number) for number, task in enumerate(record.run.tasks, start=1)}
    opened = next((history for history in histories if history.fates.get(Fate.FORGOTTEN)), histories[0])
    parts = [_task(history, numbers.get(history.task, ""), questions, history is opened) for history in histories]
    if not any(history.sample for history in histories):
        return "".join(parts)
    missing = f"Pictures and reference answers are incomplete: {questions.problem}" if questions.problem else ""
    note = f'<p class="note">{escape(missing)}</p>' if missing else ""
    return note + _filters(histories) + "".join(parts) + '<p class="none" hidden>There is no such question here.</p>'


def _filters(histories: Sequence[TaskHistory]) -> str:
    tasks = "".join(f'<option value="{escape(history.task)}">{escape(history.task)}</option>' for history in histories)
    there = [fate for fate in Fate if any(one.fate is fate for history in histories for one in history.sample)]
    choices = [("", "all"), *((_CLASSES[fate], str(fate)) for fate in there)]
    fates = "".join(
        f'<label><input type="radio" name="fate" value="{value}"{" checked" if not value else ""}>'
        f"<span>{text}</span></label>"
        for value, text in choices
    )
    return (
        '<form class="filters" hidden><label class="pick">Task <select name="task">'
        f'<option value="">all tasks</option>{tasks}</select></label>'
        f'<fieldset><legend>Questions</legend>{fates}</fieldset><output aria-live="polite"></output></form>'
    )


def _task(history: TaskHistory, number: str, questions: Questions, opened: bool) -> str:
    found = questions.find(history.task, [one.id for one in history.sample])
    names = questions.class_names(history.task)
    cards = "".join(_card(history, one, found.get(one.id), names) for one in history.sample)
    total = sum(history.fates.values())
    learned = "" if Fate.AHEAD in history.fates else f"{total} questions" + ("" if number else ", never trained")
    known = [(fate, history.fates[fate]) for fate in Fate if history.fates.get(fate)]
    bar = "".join(f'<i class="{_CLASSES[fate]}" style="flex-grow:{count}"></i>' for fate, count in known)
    text = ", ".join(f"<b>{_share(count, total)}</b> {fate}" for fate, count in known)
    note = "Captions have a score; those with at least half the score of a good one count as right."
    told = f'<p class="note">{note}</p>' if history.graded else ""
    return (
        f'<details class="task" data-task="{escape(history.task)}"{" open" if opened else ""}><summary>'
        f'<span class="name">{f"<b>{number}</b> " if number else ""}{escape(history.task)}</span>'
        f'<small>{learned}</small><span class="fates" aria-hidden="true">{bar}</span>'
        f'<span class="shares">{text}</span></summary>{told}<div class="cards">{cards}</div></details>'
    )


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.0f}%" if 200 * count >= total else "&lt;1%"


def _card(history: TaskHistory, one: History, question: Question | None, names: Mapping[str, str]) -> str:
    picture = ""
    if question and question.picture:
        alt = "picture of the question" if question.pictures == 1 else f"first of {question.pictures} pictures"
        picture = (
            f'<img src="{question.picture.uri}" width="{question.picture.width}" height="{question.picture.height}" '
            f'alt="{alt}" decoding="async">'
        )
    elif question and question.pictures:
        picture = '<p class="lost">no picture</p>'
    asked = f'<p class="asked">{_text(one.prompt)}</p>' if one.prompt else ""
    reference = f'<p class="truth"><span>reference</span> {_text(question.reference)}</p>' if question else ""
    return (
        f'<article class="{_CLASSES[one.fate]}"><div class="seen">{picture}</div><div>{asked}{reference}'
        f"{_strip(history, one)}{_answers(history, one, names)}</div></article>"
    )


def _strip(history: TaskHistory, one: History) -> str:
    """A cell for each stage, as high as the answer is good."""
    framed = ' class="learned"'
    cells = "".join(
        f"<i{framed if stage == history.learned else ''} "
        f'style="--c:{min(max(said.credit / history.scale, 0.0), 1.0):.2g}"></i>'
        for stage, said in zip(history.stages, one.said, strict=True)
    )
    return f'<div class="strip" aria-hidden="true">{cells}</div>'


def _answers(history: TaskHistory, one: History, names: Mapping[str, str]) -> str:
    """What was said, stages in a row that said the same in one line; the stage that learned the task begins one."""
    rows = []
    for (_, said), group in groupby(
        zip(history.stages, one.said, strict=True), key=lambda pair: (pair[0] >= history.learned, pair[1])
    ):
        stages = [stage for stage, _ in group]
        right = said.credit >= history.scale / 2
        partly = history.graded or 0 < said.credit < 1
        mark = f"{100 * said.credit:.0f}" if partly else "✓" if right else "✗"
        spoken = f' role="img" aria-label="{"right" if right else "wrong"}"' if not partly else ""
        text = "<em>not recorded</em>" if said.text is None else _text(names.get(said.text, said.text))
        rows.append(
            f'<li class="{"right" if right else "wrong"}{" learned" if history.learned in stages else ""}">'
            f"<span>{_span(stages)}</span><b{spoken}>{mark}</b><p>{text}</p></li>"
        )
    scrolls = ' tabindex="0"' if len(rows) > LONG else ""
    return f'<ol class="said"{scrolls}>{"".join(rows)}</ol>'


def _span(stages: Sequence[int]) -> str:
    first, last = (str(stage) if stage else "base" for stage in (stages[0], stages[-1]))
    return first if len(stages) == 1 else f"{first}–{last}"


def _text(text: str) -> str:
    """A text from data or a model as HTML: cut, escaped, and kept from turning the direction of what is around it."""
    whole = text.encode("utf-8", "replace").decode("utf-8").strip()
    if not whole:
        return "<em>empty</em>"
    cut = whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - 1] + "…"
    return f"<bdi>{escape(cut)}</bdi>"
