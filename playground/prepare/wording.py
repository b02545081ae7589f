"""Sentences that several questions share, and small helpers to write questions and answers."""

from __future__ import annotations

from collections.abc import Sequence

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NUMBER = "Answer with a number."
YES_NO = "Answer yes or no."
LETTERS = "ABCDEFGH"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def article(word: str) -> str:
    """The word with "a" or "an" in front."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def with_options(question: str, options: Sequence[str]) -> str:
    """A question followed by one lettered line per option and the instruction to answer with a letter."""
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, LETTER])
