"""The five tasks of the domain stream, laid out like MLLM-DCL."""

from __future__ import annotations

import numpy as np

from tasks import Facts, Task
from wording import NUMBER, YES_NO, with_options

ANIMALS = ("bear", "bird", "cat", "elephant", "giraffe", "zebra")
COVERS = ("coast", "desert", "forest", "grassland", "ice", "ocean")
ELEMENTS = ("oxygen", "nitrogen", "chlorine", "sulfur", "carbon")
ELEMENT = with_options("Which element besides carbon and hydrogen is in the molecule?", (*ELEMENTS[:4], "none"))
SILHOUETTE = with_options("Which animal casts this shadow?", ANIMALS)
TREND = with_options("How does the price move?", ("rising", "falling", "sideways"))
RISE = f"Did the price end higher than it began?\n{YES_NO}"
COVER = with_options("What covers most of this area?", COVERS)
DIGIT = f"What digit did the person write?\n{NUMBER}"


def _satellite(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    return (COVER, "ABCDEF"[COVERS.index(facts["cover"])]) if "cover" in facts else None


def _chemistry(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    return (ELEMENT, "ABCDE"[ELEMENTS.index(facts["element"])]) if "element" in facts else None


def _handwriting(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    return DIGIT, facts["digit"]


def _zoology(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    return (SILHOUETTE, "ABCDEF"[ANIMALS.index(facts["animal"])]) if facts["animal"] in ANIMALS else None


def _finance(facts: Facts, rng: np.random.Generator) -> tuple[str, str] | None:
    if "trend" not in facts:
        return None
    if facts["trend"] != "flat" and rng.random() < 0.6:
        return RISE, "Yes" if facts["trend"] == "up" else "No"
    return TREND, "ABC"[("up", "down", "flat").index(facts["trend"])]


TASKS = (
    Task("Satellite", "map", _satellite, ".jpg", (COVER,)),
    Task("Chemistry", "molecule", _chemistry, ".png", (ELEMENT,)),
    Task("Handwriting", "digit", _handwriting, ".raw.png", (DIGIT,)),
    Task("Zoology", "outline", _zoology, ".raw.png", (SILHOUETTE, *ANIMALS)),
    Task("Finance", "chart", _finance, ".png", (TREND, RISE, "Yes No")),
)
