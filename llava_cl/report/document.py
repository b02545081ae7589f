"""The HTML shell that every page shares: the document, its sections and its panels."""

from __future__ import annotations

from html import escape
from importlib.resources import files


def document(title: str, body: str) -> str:
    """One self-contained page; `title` is escaped, `body` is HTML."""
    style = files("llava_cl.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A headed section; `title` and `note` are escaped, `body` is HTML."""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>\n"


def panel(title: str, value: str, chart: str) -> str:
    """A small chart under its name and one number; `title` and `value` are escaped, `chart` is SVG."""
    return f"<figure><figcaption><span>{escape(title)}</span><b>{escape(value)}</b></figcaption>{chart}</figure>"


def panels(drawn: list[str]) -> str:
    """Small charts side by side, as many as fit."""
    return f'<div class="panels">{"".join(drawn)}</div>'
