"""Draw the pre-training pictures and the base's probe pictures into a cache folder outside the repository.

Usage: python playground/prepare/pretrain_pictures.py --cache DIR
Writes per kind DIR/<part>-<kind>.npy (uint8 [n, 72, 72, 3]) and DIR/<part>-<kind>.json (a list of facts).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import pictures
import splits

COUNTS = {
    "garment": 14000,
    "digit": 12000,
    "outline": 14000,
    "icon": 16000,
    "emblem": 6000,
    "scene": 20000,
    "group": 12000,
    "flag": 6000,
    "chart": 9000,
    "molecule": 9000,
    "map": 7000,
}
PROBE = 60
# share of the pictures of a frequent sort that are passed over
OFTEN = {("map", "ocean"): 0.8, ("map", "ice"): 0.5, ("molecule", None): 0.5, ("molecule", "oxygen"): 0.5}


def draw_kind(kind: str, part: splits.Part, count: int, seed: int) -> tuple[np.ndarray, list[pictures.Facts]]:
    """``count`` varied pictures of ``kind``, items used about equally often: uint8 ``[n, 72, 72, 3]``, and facts."""
    rng = np.random.default_rng([splits.SEED, seed, *kind.encode()])
    items = splits.items(kind, part)
    images: list[np.ndarray] = []
    facts: list[pictures.Facts] = []
    while len(images) < count:
        for k in rng.permutation(len(items)):
            made = pictures.make(kind, items[int(k)], rng, vary=True)
            if made is None or rng.random() < OFTEN.get((kind, made[1].get("cover") or made[1].get("element")), 0.0):
                continue
            images.append(np.asarray(made[0]))
            facts.append(made[1])
            if len(images) == count:
                break
    return np.stack(images), facts


def main() -> None:
    """Draw every kind for pre-training and for the probe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=sorted(COUNTS))
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds:
        for part, count, seed in (("pretrain", COUNTS[kind], 1), ("probe", PROBE, 2)):
            images, facts = draw_kind(kind, part, count, seed)  # type: ignore[arg-type]
            np.save(options.cache / f"{part}-{kind}.npy", images)
            (options.cache / f"{part}-{kind}.json").write_text(json.dumps(facts))
            print(kind, part, len(facts), flush=True)


if __name__ == "__main__":
    main()
