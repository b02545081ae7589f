"""Which source items belong to pre-training, to the tasks' train / val / test, and to the base's probe.

An item is what a picture is drawn from: one scanned digit, one molecule, one cell of the map, one stretch of a share's
history, one flag, one arrangement of named things. val and test items are never shared with anything else, icons apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

import icon_names
import sources

Part = Literal["pretrain", "train", "val", "test", "probe"]
SEED = 20240
CANDLES = 16
CELL, TILE = 6.0, 4.5
TASK_ICONS = 12
_DATES = {
    "pretrain": ("2000-01-01", "2007-12-31"),
    "train": ("2008-02-01", "2010-06-30"),
    "val": ("2010-08-01", "2011-02-28"),
    "test": ("2011-04-01", "2012-10-31"),
    "probe": ("2012-11-15", "2013-12-31"),
}


def _share(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(f"{SEED}:{text}".encode()).digest()[:6], "big") / 2**48


def _by_share(text: str, bounds: dict[Part, float], rest: Part) -> Part:
    drawn = _share(text)
    for part, width in bounds.items():
        if drawn < width:
            return part
        drawn -= width
    return rest


@cache
def items(kind: str, part: Part) -> list[Any]:
    """The items of one picture kind that ``part`` may draw from, in a fixed order.

    Arrangements of named things and flags are few, so train and probe share theirs with pre-training (other pictures of
    them); their val and test items are held out all the same, as are those of emblems, the icons of the set Icons. The
    icons of ``icon_names.GROUPS`` alone are shared by all parts.
    """
    reader: dict[str, Callable[[Part], list[Any]]] = {
        "garment": _garments,
        "digit": _digits,
        "outline": _outlines,
        "icon": _icons,
        "emblem": _emblems,
        "scene": _scenes,
        "group": _groups,
        "flag": _flags,
        "chart": _charts,
        "molecule": _molecules,
        "map": _cells,
    }
    return reader[kind](part)


def _slices(count: int, name: str, sizes: dict[Part, int], part: Part) -> list[int]:
    order = np.random.default_rng([SEED, len(name), *name.encode()]).permutation(count).tolist()
    start = 0
    for key, size in sizes.items():
        if key == part:
            return order[start : start + size]
        start += size
    return order[start:]


def _garments(part: Part) -> list[tuple[str, int]]:
    if part == "pretrain":
        return [("train", k) for k in range(30000)]
    sizes: dict[Part, int] = {"train": 3000, "val": 1000, "test": 2000, "probe": 1000}
    return [("t10k", k) for k in _slices(10000, "garment", sizes, part)]


def _digits(part: Part) -> list[int]:
    return _slices(5000, "digit", {"train": 1100, "val": 200, "test": 400, "probe": 60}, part)


def _outlines(part: Part) -> list[int]:
    count = len(sources.outlines()[1])
    return _slices(count, "outline", {"train": 1100, "val": 220, "test": 440, "probe": 100}, part)


def _icons(part: Part) -> list[tuple[str, str]]:
    """Base training knows the icons of ``_known_icons``; the task shows some of them, in other pictures per split.

    At this size of model, the group of an icon that neither base nor task has shown is hardly told (half are right).
    """
    chosen = []
    for group in icon_names.GROUPS:
        known = _known_icons(group)
        if part not in ("pretrain", "probe"):
            known = sorted(known, key=lambda name: _share("task icon" + name))[:TASK_ICONS]
        chosen += [(group, name) for name in sorted(known)]
    return sorted(chosen)


def _known_icons(group: str) -> list[str]:
    names = icon_names.GROUPS[group].split()
    return [n for n in names if n in icon_names.THINGS or _share("icon" + n) >= 0.23]


def _emblems(part: Part) -> list[tuple[str, str]]:
    """A fifth of every class's icons for val, three tenths for test; the other parts share the rest."""
    chosen = []
    for word, text in icon_names.EMBLEMS.items():
        names = sorted(text.split(), key=lambda name: _share("emblem" + name))
        val, test = round(0.2 * len(names)), round(0.5 * len(names))
        part_of = {"val": names[:val], "test": names[val:test]}
        chosen += [(word, name) for name in sorted(part_of.get(part, names[test:]))]
    return chosen


def _scenes(part: Part) -> list[tuple[str, str, str]]:
    wanted = part if part in ("val", "test") else "pretrain"
    held: dict[Part, float] = {"val": 0.08, "test": 0.17}
    words = icon_names.SCENE_THINGS
    every = [(a, b, axis) for a in words for b in words if a != b for axis in ("across", "down")]
    return [x for x in every if _by_share("scene" + "-".join(x), held, "pretrain") == wanted]


def _groups(part: Part) -> list[tuple[str, str, int]]:
    wanted = part if part in ("val", "test") else "pretrain"
    held: dict[Part, float] = {"val": 0.08, "test": 0.17}
    words = sorted(icon_names.ICON_OF)
    alike = [(a, a, n) for a in words for n in range(1, 7)]
    mixed = [(a, b, n) for a in words for b in words if a < b for n in range(2, 7) if _share(f"mix{a}{b}{n}") < 0.12]
    single = [(a, a, 1) for a in words]
    every = [*alike, *mixed, *single]
    return [x for x in every if _by_share("group{}-{}-{}".format(*x), held, "pretrain") == wanted]


def _flags(part: Part) -> list[str]:
    wanted = part if part in ("val", "test") else "pretrain"
    held: dict[Part, float] = {"val": 0.1, "test": 0.22}
    return [n for n in sources.flag_names() if _by_share("flag" + n, held, "pretrain") == wanted]


def _charts(part: Part) -> list[tuple[int, int]]:
    first, last = _DATES[part]
    found = []
    for k, share in enumerate(sources.prices()):
        days = [i for i, date in enumerate(share.date) if first <= date <= last]
        found += [(k, i) for i in days[: max(len(days) - CANDLES, 0) : 1 if part == "pretrain" else 2]]
    return found


def _molecules(part: Part) -> list[str]:
    held: dict[Part, float] = {"train": 0.3, "val": 0.08, "test": 0.16, "probe": 0.06}
    return [s for _, s in sources.molecules() if _by_share("molecule" + s, held, "pretrain") == part]


def _cells(part: Part) -> list[tuple[float, float]]:
    held: dict[Part, float] = {"train": 0.28, "val": 0.08, "test": 0.18, "probe": 0.06}
    every = [(-180 + CELL * x, 84 - CELL * y) for x in range(60) for y in range(28)]
    return [c for c in every if _by_share(f"cell{c[0]}/{c[1]}", held, "pretrain") == part]
