"""Draw and write the class folders of the two streams for vision models.

Usage: python playground/prepare/build_classes.py --out playground/data
Writes Classes/<Set>/{train,val,test}/<class>/<n>.png, and Incremental/{train,val,test}/<number>/<n>.png: the classes of
the three grey sets in turn, as relative links to the files of Classes, with their names in Incremental/classes.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import icon_names
import pictures
import sources
import splits
from build_data import save_picture, write_json

COUNTS: dict[splits.Part, int] = {"train": 60, "val": 15, "test": 30}
COLOUR_COUNTS: dict[splits.Part, int] = {"train": 50, "val": 15, "test": 25}
SIDE = 48
GREY = ("Garments", "Digits", "Outlines")


@dataclass(frozen=True)
class ClassSet:
    """One set: its folder name, the picture kind, its classes, and the class that a picture's facts name, if any."""

    name: str
    kind: str
    classes: tuple[str, ...]
    class_of: Callable[[pictures.Facts], str | None]
    colours: int | None = None

    @property
    def counts(self) -> dict[splits.Part, int]:
        """Pictures of every class and part: fewer of the colour sets, whose files are larger."""
        return COLOUR_COUNTS if self.colours else COUNTS


def garment_class(facts: pictures.Facts) -> str:
    """The garment, with a boot called by the name that the source gives it."""
    return facts["garment"].replace("boot", "ankle_boot")


SETS = (
    ClassSet("Garments", "garment", tuple(g.replace("boot", "ankle_boot") for g in sources.GARMENTS), garment_class),
    ClassSet("Digits", "digit", tuple("0123456789"), lambda facts: facts["digit"]),
    ClassSet("Outlines", "outline", sources.ANIMALS, lambda facts: facts["animal"]),
    ClassSet("Icons", "emblem", tuple(icon_names.EMBLEMS), lambda facts: facts["group"], 24),
    ClassSet(
        "Land",
        "map",
        ("coast", "desert", "forest", "grassland", "ice", "ocean"),
        lambda facts: facts.get("cover"),
        16,
    ),
)


def sample(chosen: ClassSet, part: splits.Part) -> dict[str, list[Image.Image]]:
    """Up to ``chosen.counts[part]`` different pictures of every class, its items used about equally often."""
    rng = np.random.default_rng([splits.SEED, *f"{chosen.name}/{part}".encode()])
    items, wanted = splits.items(chosen.kind, part), chosen.counts[part]
    found: dict[str, list[Image.Image]] = {name: [] for name in chosen.classes}
    seen: set[bytes] = set()
    for _ in range(40 if chosen.colours else 1):
        for k in rng.permutation(len(items)):
            made = pictures.make(chosen.kind, items[int(k)], rng)
            name = chosen.class_of(made[1]) if made else None
            if made is None or name is None or len(found[name]) == wanted or made[0].tobytes() in seen:
                continue
            seen.add(made[0].tobytes())
            found[name].append(made[0])
        if all(len(images) == wanted for images in found.values()):
            break
    return found


def write_set(chosen: ClassSet, folder: Path) -> None:
    """Write one set: grey pictures in their native 28 x 28, the others as 48 x 48 of few colours."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in COUNTS:
        found = sample(chosen, part)
        for name, images in found.items():
            for k, image in enumerate(images):
                path = folder / part / name / f"{k:03d}.png"
                if chosen.colours is None:
                    save_picture(image, ".raw.png", path)
                else:
                    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                    save_picture(small, ".png", path, colours=chosen.colours)
        numbers = sorted({len(images) for images in found.values()})
        print(f"{chosen.name:9} {part:5} {len(found)} classes, {numbers[0]} to {numbers[-1]} pictures each")


def write_incremental(classes: Path, folder: Path) -> None:
    """Link the grey sets' classes as 000, 001, ...: one of each set in turn."""
    shutil.rmtree(folder, ignore_errors=True)
    by_set = [[(s.name, name) for name in s.classes] for s in SETS if s.name in GREY]
    ordered = [pair for turn in zip(*by_set, strict=True) for pair in turn]
    for number, (chosen, name) in enumerate(ordered):
        for part in COUNTS:
            place = folder / part / f"{number:03d}"
            place.mkdir(parents=True)
            for file in sorted((classes / chosen / part / name).iterdir()):
                (place / file.name).symlink_to(os.path.relpath(file, place))
    names = {f"{number:03d}": f"{chosen}/{name}" for number, (chosen, name) in enumerate(ordered)}
    write_json(folder / "classes.json", names)


def main() -> None:
    """Write every set and the links, replacing what was there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for chosen in SETS:
        write_set(chosen, options.out / "Classes" / chosen.name)
    write_incremental(options.out / "Classes", options.out / "Incremental")


if __name__ == "__main__":
    main()
