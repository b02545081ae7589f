"""A strict reader of HTML pages for the tests of the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import llava_cl.report

OWN_SCRIPT = (Path(llava_cl.report.__file__).parent / "page.js").read_text(encoding="utf-8")
VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data)


def check_page(html: str) -> Page:
    """Asserts that a page is balanced, fetches nothing, runs its own script alone, and that its drawings are XML."""
    page = Page(html)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert html.endswith(f"<script>{OWN_SCRIPT}</script></body></html>\n")
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        own = "data:image/jpeg;base64," if (tag, name) == ("img", "src") else "#"
        assert name not in FETCHING or value.startswith(own), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style
    assert not re.search(r"url\(|@import|@font-face|https?:", style.group(1))
    for drawing in drawings(html):
        assert drawing.tag == "svg"
    return page


def drawings(html: str) -> list[ElementTree.Element]:
    """Every inline SVG, read by an XML parser."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg\b.*?</svg>", html, re.S)]
