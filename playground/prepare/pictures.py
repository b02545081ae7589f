"""One picture of each kind with everything known about it, for pre-training and for the tasks alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

import draw
import icon_names
import sources
import splits

Facts = dict[str, str]
TURNS = ("upright", "left", "upside down", "right")
ELEMENTS = {"O": "oxygen", "N": "nitrogen", "Cl": "chlorine", "S": "sulfur"}


def make(kind: str, item: Any, rng: np.random.Generator, *, vary: bool = False) -> tuple[Image.Image, Facts] | None:
    """Draw ``item`` of ``kind``: the picture and its facts (name -> word).

    vary: also turn, shift, invert and enlarge the grey kinds, which else keep their native 28 x 28, and turn single
    icons, as pre-training wants. None where the item
    cannot be drawn or shows nothing definite.
    """
    maker: dict[str, Callable[..., tuple[Image.Image, Facts] | None]] = {
        "garment": _garment,
        "digit": _digit,
        "outline": _outline,
        "icon": _icon,
        "emblem": _icon,
        "scene": _scene,
        "group": _group,
        "flag": _flag,
        "chart": _chart,
        "molecule": _molecule,
        "map": _map,
    }
    made = maker[kind](item, rng, vary)
    if made is None:
        return None
    image, facts = made
    return image, {"kind": kind, **facts}


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _grey(pixels: np.ndarray, rng: np.random.Generator, vary: bool, turn: bool) -> tuple[Image.Image, Facts]:
    image = Image.fromarray(pixels)
    facts = {"ground": "black", "turn": "upright"}
    if vary:
        quarter = int(rng.integers(0, 4)) if turn and rng.random() < 0.3 else 0
        small = float(rng.uniform(-8, 8))
        shift = (1, 0, float(rng.uniform(-2, 2)), 0, 1, float(rng.uniform(-2, 2)))
        image = image.transform((28, 28), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
        image = image.rotate(90 * quarter + small, Image.Resampling.BILINEAR)
        facts["turn"] = TURNS[quarter]
        if rng.random() < 0.1:
            image = Image.eval(image, lambda v: 255 - v)
            facts["ground"] = "white"
        return draw.enlarge(np.asarray(image)), facts
    return image.convert("RGB"), facts


def _garment(item: tuple[str, int], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    pixels, labels = _garment_arrays(item[0])
    image, facts = _grey(pixels[item[1]], rng, vary, turn=True)
    return image, {"garment": sources.GARMENTS[labels[item[1]]], **facts}


def _digit(item: int, rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    pixels, labels = _digit_arrays()
    image, facts = _grey(pixels[item], rng, vary, turn=False)
    del facts["turn"]
    return image, {"digit": str(labels[item]), **facts}


def _outline(item: int, rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    pixels, labels = _outline_arrays()
    shown = pixels[item][:, ::-1] if vary and rng.random() < 0.5 else pixels[item]
    image, facts = _grey(np.ascontiguousarray(shown), rng, vary, turn=True)
    return image, {"animal": sources.ANIMALS[labels[item]], **facts}


def _icon(item: tuple[str, str], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    group, name = item
    colour = _ground_colour(rng)
    image = draw.ground(colour, rng)
    size = int(rng.integers(26, 37)) if rng.random() < 0.4 else int(rng.integers(48, 66))
    reach = (draw.SIDE - size) / 2
    centre = (36 + rng.uniform(-reach, reach) * 0.8, 36 + rng.uniform(-reach, reach) * 0.8)
    quarter = int(rng.integers(0, 4)) if vary and rng.random() < 0.25 else 0
    tilt = float(rng.uniform(-12, 12))
    draw.paste(image, "noto", name, centre, size, 90 * quarter + tilt, bool(rng.random() < 0.5))
    facts = {"group": group, "ground": colour, "turn": TURNS[quarter], "icon": name}
    facts["size"] = "small" if size < 40 else "big"
    if name in icon_names.THINGS:
        facts["thing"] = icon_names.THINGS[name]
    return image, facts


def _scene(item: tuple[str, str, str], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    first, second, axis = item
    colour = _ground_colour(rng)
    image = draw.ground(colour, rng)
    big_first = bool(rng.random() < 0.5)
    sizes = (36, 24) if big_first else (24, 36)
    for word, size, place in zip((first, second), sizes, (19.0, 53.0), strict=True):
        side = float(rng.uniform(24, 48))
        centre = (place + rng.uniform(-1, 1), side) if axis == "across" else (side, place + rng.uniform(-1, 1))
        draw.paste(
            image, "noto", icon_names.ICON_OF[word], centre, size, float(rng.uniform(-8, 8)), bool(rng.random() < 0.5)
        )
    names = ("left", "right") if axis == "across" else ("top", "bottom")
    facts = {
        names[0]: first,
        names[1]: second,
        "ground": colour,
        "axis": axis,
        "bigger": first if big_first else second,
    }
    facts.update({f"shows {w}": _yes(w in (first, second)) for w in icon_names.SCENE_THINGS})
    return image, facts


def _group(item: tuple[str, str, int], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    first, second, count = item
    colour = _ground_colour(rng)
    image = draw.ground(colour, rng)
    of_first = int(rng.integers(1, count)) if first != second else count
    words = [first] * of_first + [second] * (count - of_first)
    for word, centre in zip(words, draw.scatter(count, rng), strict=True):
        draw.paste(
            image, "noto", icon_names.ICON_OF[word], centre, int(rng.integers(19, 24)), 0.0, bool(rng.random() < 0.5)
        )
    facts = {"count": str(count), "same": _yes(first == second), "ground": colour, "several": _yes(count > 3)}
    facts.update({f"shows {w}": _yes(w in words) for w in icon_names.ICON_OF})
    return image, facts


def _flag(item: str, rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    colour = _ground_colour(rng)
    image = draw.ground(colour, rng)
    size = int(rng.integers(50, 70))
    reach = (draw.SIDE - size) / 2
    draw.paste(image, "circle-flags", item, (36 + rng.uniform(-reach, reach), 36 + rng.uniform(-reach, reach)), size)
    shares = draw.flag_shares(item)
    ranked = sorted(shares, key=lambda c: -shares[c])
    facts = {"ground": colour}
    if shares[ranked[0]] > 1.25 * shares[ranked[1]]:
        facts["main colour"] = ranked[0]
    for name, share in shares.items():
        if share > 0.08 or share < 0.01:
            facts[f"has {name}"] = _yes(share > 0.08)
    return image, facts


def _chart(item: tuple[int, int], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    shares = _shares()
    share, days = shares[item[0]], splits.CANDLES
    part = slice(item[1], item[1] + days)
    low, high, close, first = share.low[part], share.high[part], share.close[part], share.open[part]
    move = (close[-1] - first[0]) / (high.max() - low.min())
    thirds = ("left", "middle", "right")
    facts = {
        "peak": thirds[min(int(high.argmax()) * 3 // days, 2)],
        "lowest": thirds[min(int(low.argmin()) * 3 // days, 2)],
    }
    ups = int((close >= first).sum())
    if abs(2 * ups - days) >= 4:
        facts["candles"] = "green" if 2 * ups > days else "red"
    if abs(move) > 0.35 or abs(move) < 0.15:
        facts["trend"] = "flat" if abs(move) < 0.15 else "up" if move > 0 else "down"
    return draw.candlesticks(share, item[1], days), facts


def _molecule(item: str, rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts] | None:
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(item)
    if parsed is None or not 4 <= parsed.GetNumAtoms() <= 10:
        return None
    symbols = {a.GetSymbol() for a in parsed.GetAtoms()}
    if symbols - {"C", *ELEMENTS}:
        return None
    image = draw.molecule(item, rng)
    if image is None:
        return None
    facts = {f"has {word}": _yes(symbol in symbols) for symbol, word in ELEMENTS.items()}
    others = symbols - {"C"}
    if len(others) < 2:
        facts["element"] = ELEMENTS[others.pop()] if others else "carbon"
    facts["ring"] = _yes(parsed.GetRingInfo().NumRings() > 0)
    facts["atoms"] = "few" if parsed.GetNumAtoms() <= 6 else "many"
    return image, facts


def _map(item: tuple[float, float], rng: np.random.Generator, vary: bool) -> tuple[Image.Image, Facts]:
    slack = splits.CELL - splits.TILE
    image, land = draw.map_tile(item[0] + rng.uniform(0, slack), item[1] - rng.uniform(0, slack), splits.TILE)
    pixels = np.asarray(image).astype(np.int64)
    share = float(land.mean())
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    ice = float((pixels.min(-1) > 165).mean())
    sand = float(((red - blue > 42) & (red > 130)).mean())
    wood = float(((green > red) & (green > blue + 6) & (red < 75)).mean())
    plain = float(((red >= green) & (red - blue > 22) & (red > 65) & (red < 128)).mean())
    facts = {}
    if share < 0.02 and ice < 0.05:
        facts["cover"] = "ocean"
    elif 0.25 < share < 0.75 and ice < 0.2:
        facts["cover"] = "coast"
    elif share > 0.9:
        best = max((ice, "ice"), (sand, "desert"), (wood, "forest"), (plain, "grassland"))
        if best[0] > 0.55:
            facts["cover"] = best[1]
    if share < 0.02 or share > 0.15:
        facts["land"] = _yes(share > 0.15)
    halves = float(land[: len(land) // 2].mean()), float(land[len(land) // 2 :].mean())
    if abs(halves[0] - halves[1]) > 0.25:
        facts["more land"] = "top" if halves[0] > halves[1] else "bottom"
    light = float(pixels.mean())
    if light < 55 or light > 85:
        facts["light"] = "dark" if light < 55 else "bright"
    return image, facts


def _ground_colour(rng: np.random.Generator) -> str:
    return str(rng.choice(list(draw.GROUNDS)))


@cache
def _digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    return sources.digits()


@cache
def _outline_arrays() -> tuple[np.ndarray, np.ndarray]:
    return sources.outlines()


@cache
def _garment_arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
    return sources.garments(part)


@cache
def _shares() -> list[sources.Candles]:
    return sources.prices()
