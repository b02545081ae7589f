"""The errors a user can meet, each carrying the exit code of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator


class LlavaClError(Exception):
    """A failure that is reported to the user as one message, without a traceback. Exit code 1."""

    exit_code = 1


class InputError(LlavaClError):
    """Something the user gave is wrong: configuration, data, paths or arguments. Exit code 2.

    Args:
        problems: one sentence for each thing that is wrong, each saying what, where and what to do.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class RunError(LlavaClError):
    """A run failed although its input was right, for example because a rank died. Exit code 1."""


def problems_of(*checks: Callable[[], object]) -> Iterator[str]:
    """The problems of every check that raises InputError, so that they can be told at once."""
    for check in checks:
        try:
            check()
        except InputError as error:
            yield from error.problems
