"""What is shown to people: every text passes here, and none of it can steer a terminal or end a command."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_KEPT = frozenset("\n\t\u200c\u200d")
"""Beside what has a shape: ends of lines, tabs, and the joiners that some scripts and emoji need."""


def printable(text: str) -> str:
    r"""Text in which control characters, marks that turn its direction and halves of pairs are escapes (`\x1b`)."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in _KEPT or unicodedata.category(letter) == "Zs"
        else ascii(letter)[1:-1]
        for letter in text
    )


class Terminal(Console):
    """A console that shows texts as they are, without markup; nothing in them reaches the terminal as a command.

    Args:
        stderr: write to standard error.
        options: those of rich's console.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, of a printable text."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything that can be shown, their texts printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more: what follows is not shown, but a run goes on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(console: Console, text: str, style: str = "") -> None:
    """Shows a text as it is, its lines as long as they are."""
    console.print(Text(printable(text), style), soft_wrap=True)


def prepare_streams() -> None:
    """Makes standard output and error take any text: what they cannot encode is escaped, and closed ones take all."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            # Otherwise the next file that is opened would take its number, and what libraries write.
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
