"""What a stream task is to the builder: a picture kind, a question about it, and the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Facts = dict[str, str]


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: folder name.
        kind: picture kind of ``pictures.make``.
        ask: facts and a generator -> (question, answer), or None where the picture does not fit the task.
        suffix: ".png" for pictures of few colours, ".jpg" otherwise, ".raw.png" for grey pictures in native size.
        wording: further texts of the task, for the vocabulary.
        references: facts -> captions, for a caption task.
        balance_by: facts -> the sort of picture to balance over; the answer where absent.
    """

    name: str
    kind: str
    ask: Callable[[Facts, np.random.Generator], tuple[str, str] | None]
    suffix: str
    wording: tuple[str, ...] = ()
    references: Callable[[Facts], list[str]] | None = None
    balance_by: Callable[[Facts], str] | None = field(default=None)
