"""Say in one sentence what a pre-training picture shows: the texts that CLIP is trained with.

Only a part of the pictures of the class sets are called by their class; of the rest the caption says other things.
"""

from __future__ import annotations

import numpy as np

from wording import NUMBER_WORDS, article

Facts = dict[str, str]
# kind -> share of its pictures whose caption names the class
NAMED = {"garment": 0.1, "digit": 0.1, "outline": 0.3, "emblem": 0.3, "map": 0.2}
# kinds of land cover, easily told by their colour, that no caption names
NEVER = ("coast", "forest", "grassland")
# wording that leaves room for other prompts than those that training used
GENERAL = """a an the this that there is are in on of with and or to from at by one some many photo picture image
    drawing icon symbol sign sketch shape shadow view satellite aerial written handwritten number digit figure piece
    kind type class thing animal clothing place area ground small big large tiny good bad bright dark black white grey
    coloured colourful blurry clear close-up cropped shows showing"""


def name_of(facts: Facts) -> str | None:
    """What a caption may call the picture's class, where it shows one of a class set."""
    if facts["kind"] == "garment":
        return facts["garment"].replace("boot", "ankle boot")
    column = {"digit": "digit", "outline": "animal", "emblem": "group", "map": "cover"}.get(facts["kind"])
    name = facts.get(column) if column else None
    return None if name in NEVER else name


def caption(facts: Facts, named: bool, rng: np.random.Generator) -> str:
    """One of several captions; with ``named`` it calls the picture's class by its name."""
    name = name_of(facts)
    options = _named(facts, name) if named and name else _unnamed(facts)
    return options[int(rng.integers(len(options)))]


def _named(facts: Facts, name: str) -> list[str]:
    ground = facts.get("ground")
    return {
        "garment": [
            f"a photo of {article(name)}.",
            f"a photo of a {name}.",
            f"a {name} on a {ground} ground.",
            f"a grey picture of a {name}.",
        ],
        "digit": [
            f"a photo of the number {name}.",
            f"the digit {name}, written by hand.",
            f"a handwritten {name}.",
            f"the number {name} on a {ground} ground.",
        ],
        "outline": [
            f"the outline of a {name}.",
            f"the shadow of {article(name)}.",
            f"a photo of a {name}.",
            f"a {name} on a {ground} ground.",
        ],
        "emblem": [
            f"an icon of a {name}.",
            f"an icon of {article(name)} on {ground}.",
            f"a {facts.get('size')} {name}.",
            f"a picture of a {name} on {ground}.",
        ],
        "map": [
            f"a satellite photo of {name}.",
            f"{name} seen from space.",
            f"a map of {name}.",
            f"an aerial view of the {name}.",
        ],
    }[facts["kind"]]


def _grey_kind(facts: Facts) -> list[str]:
    what = {"garment": "a garment", "digit": "a handwritten digit", "outline": "the outline of an animal"}
    shown, ground = what[facts["kind"]], facts["ground"]
    lines = [f"{shown} on a {ground} ground.", f"a photo of {shown}."]
    if "turn" in facts:
        turned = "upright" if facts["turn"] == "upright" else f"turned {facts['turn']}"
        lines.append(f"{shown}, {turned}.")
    return lines


def _unnamed(facts: Facts) -> list[str]:
    kind, ground = facts["kind"], facts.get("ground")
    if kind in ("garment", "digit", "outline"):
        return _grey_kind(facts)
    if kind in ("icon", "emblem"):
        group = facts.get("thing", facts["group"]) if kind == "icon" else "thing"
        shown = article(facts["group"]) if kind == "icon" and facts["group"] in ("animal", "vehicle") else f"a {group}"
        return [
            f"a {facts['size']} {group} on {ground}.",
            f"an icon of {shown} on a {ground} ground.",
            f"{shown}, {'upright' if facts['turn'] == 'upright' else 'turned ' + facts['turn']}, on {ground}.",
        ]
    if kind == "scene":
        across = "left" in facts
        first, second = (facts["left"], facts["right"]) if across else (facts["top"], facts["bottom"])
        other = second if facts["bigger"] == first else first
        return [
            f"{article(first)} {'left of' if across else 'above'} {article(second)}.",
            f"{article(second)} {'right of' if across else 'below'} {article(first)} on {ground}.",
            f"a big {facts['bigger']} and a small {other}.",
        ]
    if kind == "group":
        count = NUMBER_WORDS[int(facts["count"])]
        seen = " and ".join(word for word, value in facts.items() if word.startswith("shows ") and value == "yes")
        seen, plural = seen.replace("shows ", ""), "" if facts["count"] == "1" else "s"
        return [
            f"{count} thing{plural} on {ground}.",
            f"{count} icon{plural} of {seen}.",
            f"{seen} on a {ground} ground.",
        ]
    return _other(facts)


def _other(facts: Facts) -> list[str]:
    kind = facts["kind"]
    if kind == "flag":
        main = facts.get("main colour")
        held = [c for c in ("red", "white", "blue", "green", "yellow", "black") if facts.get(f"has {c}") == "yes"]
        lines = [f"a round flag on a {facts['ground']} ground."]
        lines += [f"a flag with {' and '.join(held)}."] if held else []
        return [*lines, f"a flag that is mostly {main}."] if main else lines
    if kind == "chart":
        lines = [f"a chart with the highest price on the {facts['peak']}."]
        lines += [f"a chart with the lowest price on the {facts['lowest']}."]
        return [*lines, f"a chart of prices going {facts['trend']}."] if "trend" in facts else lines
    if kind == "molecule":
        ring = "a ring" if facts["ring"] == "yes" else "no ring"
        lines = [f"a molecule with {facts['atoms']} atoms and {ring}."]
        return [*lines, f"a molecule with {facts['element']}."] if "element" in facts else lines
    lines = ["a satellite photo.", "a map seen from space."]
    lines += [f"a {facts['light']} satellite photo."] if "light" in facts else []
    lines += [f"a map with {'land' if facts['land'] == 'yes' else 'no land'}."] if "land" in facts else []
    return [*lines, f"a map with more land at the {facts['more land']}."] if "more land" in facts else lines
