"""The six tasks of the general stream, laid out like UCIT."""

from __future__ import annotations

import numpy as np

import draw
import icon_names
from tasks import Facts, Task
from wording import NUMBER, NUMBER_WORDS, WORD, with_options

GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
CAPTION = "What happens in the image?\nGenerate a brief caption for the image."
ICON_GROUPS = with_options("What does the icon show?", tuple(icon_names.GROUPS))
FLAG_COLOURS = with_options("Which colour covers most of the flag?", tuple(draw.FLAG_COLOURS))


def _fashion(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    if facts["garment"] not in GARMENTS:
        return None
    return f"Which piece of clothing is shown?\n{WORD}", facts["garment"]


def _icon_group(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    if facts["size"] == "small":
        return None
    return ICON_GROUPS, "ABCD"[tuple(icon_names.GROUPS).index(facts["group"])]


def captions(facts: Facts) -> list[str]:
    """Four captions of a scene, the one that training uses first."""
    ground = facts["ground"]
    if "left" in facts:
        first, second, forth, back = facts["left"], facts["right"], "to the left of", "to the right of"
    else:
        first, second, forth, back = facts["top"], facts["bottom"], "above", "below"
    sizes = {True: "big", False: "small"}
    one = f"{sizes[facts['bigger'] == first]} {first}"
    two = f"{sizes[facts['bigger'] == second]} {second}"
    return [
        f"a {one} {forth} a {two} on a {ground} background",
        f"a {two} {back} a {one} on a {ground} background",
        f"there is a {one} {forth} a {two} on a {ground} background",
        f"a {one} and a {two} on a {ground} background",
    ]


def _caption(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    return CAPTION, captions(facts)[0]


def _flag_colour(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    if "main colour" not in facts:
        return None
    return FLAG_COLOURS, "ABCDEF"[tuple(draw.FLAG_COLOURS).index(facts["main colour"])]


def _count(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    return f"How many things are in the picture?\n{NUMBER}", facts["count"]


def _number_word(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    return f"Which number is written here?\n{WORD}", NUMBER_WORDS[int(facts["digit"])]


TASKS = (
    Task("Fashion", "garment", _fashion, ".raw.png", GARMENTS),
    Task("IconGroups", "icon", _icon_group, ".jpg", (ICON_GROUPS,)),
    Task(
        "SceneCaptions",
        "scene",
        _caption,
        ".jpg",
        (CAPTION, "a big to the left right of above below small and there is on"),
        references=captions,
        balance_by=lambda facts: facts["axis"],
    ),
    Task("FlagColours", "flag", _flag_colour, ".jpg", (FLAG_COLOURS,)),
    Task("Counting", "group", _count, ".jpg", (f"How many things are in the picture?\n{NUMBER}",)),
    Task("NumberWords", "digit", _number_word, ".raw.png", ("Which number is written here?", *NUMBER_WORDS)),
)
