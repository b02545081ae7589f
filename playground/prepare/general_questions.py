"""Questions of the base: what a pretrained model knows about any picture before the streams begin.

None of them is a question of a stream task, and none has a task's answer mapping: the base tells a sneaker from a bag
by "Is this a sneaker?" and "Where is it worn?", and the task that names garments is new to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import icon_names
import sources
from wording import LETTERS, NUMBER_WORDS, WORD, YES_NO, article, with_options

Facts = dict[str, str]
Question = tuple[str, str]

KIND_WORDS = {
    "garment": "garment",
    "digit": "digit",
    "outline": "silhouette",
    "icon": "icon",
    "scene": "scene",
    "group": "collection",
    "flag": "flag",
    "chart": "chart",
    "molecule": "molecule",
    "map": "map",
}
COLOURS = ("white", "grey", "black", "red", "green", "blue", "yellow", "pink")
WORN = {
    "t-shirt": "body",
    "trousers": "legs",
    "pullover": "body",
    "dress": "body",
    "coat": "body",
    "sandal": "feet",
    "shirt": "body",
    "sneaker": "feet",
    "bag": "hand",
    "boot": "feet",
}
HABITAT = {
    "bear": "wild",
    "bird": "air",
    "cat": "home",
    "cow": "farm",
    "dog": "home",
    "elephant": "wild",
    "giraffe": "wild",
    "horse": "farm",
    "sheep": "farm",
    "zebra": "wild",
}
GROUP_QUESTIONS = {
    "animal": "Is this alive?",
    "food": "Is this something to eat?",
    "vehicle": "Is this something to ride?",
    "clothing": "Is this something to wear?",
}
SURFACES = ("ocean", "coast", "ice", "desert", "forest", "grassland")
ELEMENTS = ("oxygen", "nitrogen", "chlorine", "sulfur")
PLACES = {
    "left": "What is on the left?",
    "right": "What is on the right?",
    "top": "What is at the top?",
    "bottom": "What is at the bottom?",
}


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _is_it(name: str, names: tuple[str, ...], rng: np.random.Generator) -> Question:
    """Is this a ...? - the right name half of the time."""
    asked = name if rng.random() < 0.5 else str(rng.choice([n for n in names if n != name]))
    return f"Is this {article(asked)}?\n{YES_NO}", _yes(asked == name)


def _choice(question: str, answer: str, names: tuple[str, ...], rng: np.random.Generator) -> Question:
    """A question with one word as its answer; one time in four as a choice between lettered options in any order."""
    if rng.random() < 0.75:
        return f"{question}\n{WORD}", answer
    wrong = [n for n in names if n != answer]
    count = min(int(rng.integers(1, 4)), len(wrong))
    options = [str(n) for n in rng.permutation([answer, *rng.choice(wrong, count, replace=False)])]
    return with_options(question, options), LETTERS[options.index(answer)]


def _common(facts: Facts, rng: np.random.Generator) -> list[Question]:
    found = [_choice("What kind of picture is this?", KIND_WORDS[facts["kind"]], tuple(KIND_WORDS.values()), rng)]
    if "ground" in facts:
        found.append(_choice("What colour is the background?", facts["ground"], COLOURS, rng))
    if "turn" in facts:
        found.append(
            _choice("Which way is it turned?", facts["turn"], ("upright", "left", "right", "upside down"), rng)
        )
    return found


def _garment(facts: Facts, rng: np.random.Generator) -> list[Question]:
    name = facts["garment"]
    found = [
        _choice("Where is it worn?", WORN[name], ("body", "legs", "feet", "hand"), rng),
        _is_it(name, sources.GARMENTS, rng),
        _is_it(name, sources.GARMENTS, rng),
    ]
    if WORN[name] == "body" and name != "dress":
        found.append((f"Does it have long sleeves?\n{YES_NO}", _yes(name != "t-shirt")))
    return found


def _digit(facts: Facts, rng: np.random.Generator) -> list[Question]:
    value = int(facts["digit"])
    limit = int(rng.integers(1, 8))
    return [
        _choice("Is the number even or odd?", "odd" if value % 2 else "even", ("even", "odd"), rng),
        (f"Is the number larger than {limit}?\n{YES_NO}", _yes(value > limit)),
        _is_it(NUMBER_WORDS[value], NUMBER_WORDS, rng),
        _is_it(str(value), tuple("0123456789"), rng),
    ]


def _outline(facts: Facts, rng: np.random.Generator) -> list[Question]:
    name = facts["animal"]
    return [
        _choice("Where does this animal live?", HABITAT[name], ("wild", "air", "home", "farm"), rng),
        _is_it(name, sources.ANIMALS, rng),
        _is_it(name, sources.ANIMALS, rng),
    ]


def _icon(facts: Facts, rng: np.random.Generator) -> list[Question]:
    group = str(rng.choice(list(GROUP_QUESTIONS))) if rng.random() < 0.5 else facts["group"]
    found = [
        (f"{GROUP_QUESTIONS[group]}\n{YES_NO}", _yes(group == facts["group"])),
        _choice("Is it small or big?", facts["size"], ("small", "big"), rng),
    ]
    if "thing" in facts:
        found += [_choice("What is shown?", facts["thing"], tuple(icon_names.ICON_OF), rng)] * 2
    return found


def _scene(facts: Facts, rng: np.random.Generator) -> list[Question]:
    words = icon_names.SCENE_THINGS
    found = [_choice(text, facts[place], words, rng) for place, text in PLACES.items() if place in facts]
    found.append(_choice("Which thing is bigger?", facts["bigger"], words, rng))
    pair = [facts[p] for p in PLACES if p in facts]
    found.append((f"Which things are shown?\n{WORD}", f"{pair[0]} and {pair[1]}"))
    asked = str(rng.choice(pair if rng.random() < 0.5 else words))
    found.append((f"Is there {article(asked)}?\n{YES_NO}", facts[f"shows {asked}"]))
    arrangement = "side by side" if facts["axis"] == "across" else "one above the other"
    found.append((f"How are the things arranged?\n{WORD}", arrangement))
    return found


def _group(facts: Facts, rng: np.random.Generator) -> list[Question]:
    shown = [w for w in icon_names.ICON_OF if facts[f"shows {w}"] == "yes"]
    asked = str(rng.choice(shown if rng.random() < 0.5 else list(icon_names.ICON_OF)))
    limit = int(rng.integers(1, 6))
    return [
        (f"Are there more than {NUMBER_WORDS[limit]} things?\n{YES_NO}", _yes(int(facts["count"]) > limit)),
        (f"Are there more than {NUMBER_WORDS[3]} things?\n{YES_NO}", facts["several"]),
        (f"Are all things the same?\n{YES_NO}", facts["same"]),
        (f"Is there {article(asked)}?\n{YES_NO}", facts[f"shows {asked}"]),
    ]


def _flag(facts: Facts, rng: np.random.Generator) -> list[Question]:
    known = [c for c in ("red", "white", "blue", "green", "yellow", "black") if f"has {c}" in facts]
    asked = rng.permutation(known)[:3]
    return [(f"Is there any {c} in the flag?\n{YES_NO}", facts[f"has {c}"]) for c in asked]


def _chart(facts: Facts, rng: np.random.Generator) -> list[Question]:
    thirds = ("left", "middle", "right")
    return [
        _choice("Where is the highest price?", facts["peak"], thirds, rng),
        _choice("Where is the lowest price?", facts["lowest"], thirds, rng),
    ]


def _molecule(facts: Facts, rng: np.random.Generator) -> list[Question]:
    asked = rng.permutation(list(ELEMENTS))[:2]
    found = [(f"Is there any {e}?\n{YES_NO}", facts[f"has {e}"]) for e in asked]
    found.append((f"Is there a ring?\n{YES_NO}", facts["ring"]))
    found.append(_choice("Does it have few or many atoms?", facts["atoms"], ("few", "many"), rng))
    return found


def _map(facts: Facts, rng: np.random.Generator) -> list[Question]:
    found = []
    if "land" in facts:
        found.append((f"Is there any land?\n{YES_NO}", facts["land"]))
    if "more land" in facts:
        found.append(_choice("Where is more land?", facts["more land"], ("top", "bottom"), rng))
    if "light" in facts:
        found.append(_choice("Is the picture dark or bright?", facts["light"], ("dark", "bright"), rng))
    if "cover" in facts:
        asked = facts["cover"] if rng.random() < 0.5 else str(rng.choice(SURFACES))
        found.append((f"Does it show {asked}?\n{YES_NO}", _yes(asked == facts["cover"])))
    return found


_BY_KIND: dict[str, Callable[[Facts, np.random.Generator], list[Question]]] = {
    "garment": _garment,
    "digit": _digit,
    "outline": _outline,
    "icon": _icon,
    "scene": _scene,
    "group": _group,
    "flag": _flag,
    "chart": _chart,
    "molecule": _molecule,
    "map": _map,
}


def about(facts: Facts, rng: np.random.Generator) -> list[Question]:
    """Every question that can be asked about one picture, each with its answer, in a fixed order."""
    return _BY_KIND[facts["kind"]](facts, rng) + _common(facts, rng)


def text_only(words: list[str], rng: np.random.Generator) -> Question:
    """A question without a picture: repeat some words, or find the letter of an option, or the option of a letter."""
    if rng.random() < 0.6:
        chosen = [str(w) for w in rng.choice(words, int(rng.integers(1, 8)))]
        return f"Repeat after me: {' '.join(chosen)}", " ".join(chosen)
    options = [str(w) for w in rng.choice(words, int(rng.integers(2, 7)), replace=False)]
    right = int(rng.integers(len(options)))
    if rng.random() < 0.5:
        return with_options(f"Which letter stands before {options[right]}?", options), LETTERS[right]
    lines = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"What stands after {LETTERS[right]}?\n{lines}\n{WORD}", options[right]


def texts() -> list[str]:
    """All wording of the base's questions, for the vocabulary."""
    rng = np.random.default_rng(0)
    fixed = [WORD, YES_NO, *KIND_WORDS.values(), *COLOURS, *WORN.values(), *HABITAT.values(), *SURFACES, *ELEMENTS]
    fixed += [*GROUP_QUESTIONS.values(), *PLACES.values(), *NUMBER_WORDS, *"0123456789", *LETTERS, *sources.GARMENTS]
    fixed += [*sources.ANIMALS, *icon_names.ICON_OF, *(article(w) for w in icon_names.ICON_OF)]
    fixed += ["Repeat after me:", "What stands after A?", with_options("Which letter stands before A?", ["red"])]
    fixed += [
        "What kind of picture is this?",
        "What colour is the background?",
        "Which way is it turned?",
        "upright upside down",
    ]
    sample: list[Facts] = [
        {"kind": "garment", "garment": "coat"},
        {"kind": "digit", "digit": "3"},
        {"kind": "outline", "animal": "cat"},
        {"kind": "icon", "group": "food", "size": "small", "thing": "apple"},
        {"kind": "chart", "peak": "left", "lowest": "middle"},
        {"kind": "flag", "has red": "yes"},
        {"kind": "molecule", **{f"has {e}": "no" for e in ELEMENTS}, "ring": "no", "atoms": "few"},
        {"kind": "map", "land": "yes", "more land": "top", "light": "dark", "cover": "ice"},
        {
            "kind": "group",
            "count": "2",
            "several": "no",
            "same": "yes",
            **{f"shows {w}": "yes" for w in icon_names.ICON_OF},
        },
        {
            "kind": "scene",
            "left": "dog",
            "right": "cup",
            "axis": "across",
            "bigger": "dog",
            **{f"shows {w}": "yes" for w in icon_names.SCENE_THINGS},
        },
        {
            "kind": "scene",
            "top": "dog",
            "bottom": "cup",
            "axis": "down",
            "bigger": "dog",
            **{f"shows {w}": "yes" for w in icon_names.SCENE_THINGS},
        },
    ]
    for facts in sample:
        for question, answer in about(facts, rng):
            fixed += [question, answer]
    fixed += ["small or big few many dark bright top bottom left middle right even odd yes no"]
    return fixed
