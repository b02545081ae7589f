"""Numbers, names and other texts, the same on the page and on the console."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

from llava_cl.terminal import printable

METRICS = {
    "Last": "Mean accuracy over all tasks after the last stage.",
    "Average": "Mean over all stages, then over all tasks.",
    "Transfer": "Mean accuracy on a task before it is learned, over tasks 2 to T.",
    "MFT": "Mean of the diagonal: each task right after it is learned.",
    "MFN": "Mean of the last row: every task at the end.",
    "MAA": "Mean over stages of the mean over the tasks seen so far.",
    "BWT": "Last minus diagonal, mean over the first T − 1 tasks.",
    "BWT_T": "The same sum as BWT, divided by T.",
    "Forgetting": "Best earlier accuracy minus last, mean over the earlier tasks.",
}
"""What each summary metric means; keys as in metrics.json, accuracies in percent, differences in points."""
CLASS_METRICS = {
    "LastAll": "Accuracy over the test images of all classes at the end.",
    "AAA": "Mean over stages of the accuracy over the images of all classes seen so far.",
}
"""Those of class-incremental streams, in which all classes seen so far compete."""

SIGNED = frozenset({"BWT", "BWT_T"})
LOWER_IS_BETTER = frozenset({"Forgetting"})
MISSING = "–"


def escape(text: str) -> str:
    """A text as HTML, in which nothing is markup or turns the direction of what follows."""
    return html.escape(printable(text))


def shown(summaries: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """The metrics that a table of these summaries shows, and what they mean."""
    known = {name for summary in summaries for name in summary}
    return {**{name: meaning for name, meaning in CLASS_METRICS.items() if name in known}, **METRICS}


def percent(value: float | None, digits: int = 1) -> str:
    """A percentage without its sign, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points with its sign, no sign where it rounds to zero, or a dash."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def metric(name: str, value: float | None) -> str:
    """The value of a summary metric, two decimals."""
    return signed(value, 2) if name in SIGNED else percent(value, 2)


def duration(seconds: float) -> str:
    """Seconds as "8.3 s", "4 m 10 s" or "2 h 05 m"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def memory(count: int | None) -> str:
    """Bytes as "512 MiB" or "71.3 GiB", or a dash."""
    if count is None:
        return MISSING
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"
