"""The HTML shell that every page shares: the document, its sections and its panels."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from llava_cl.report.text import escape


def document(title: str, body: str, refresh: int | None = None) -> str:
    """One self-contained page.

    Its content policy lets nothing be fetched, and no script run but the page's own, whatever the body holds.

    Args:
        title: is escaped.
        body: HTML.
        refresh: seconds after which the page reads itself again; None for a page that is complete.
    """
    style, script = (
        files("llava_cl.report").joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    live = f' data-refresh="{refresh}"' if refresh else ""
    again = f'<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>' if refresh else ""
    return (
        f'<!doctype html>\n<html lang="en"{live}><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{again}'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}</main>"
        f"<script>{script}</script></body></html>\n"
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
