"""A page as it reads: the text of each row and paragraph on a line, [video], [img] and [svg] where there is one."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = {"p", "h1", "h2", "h3", "tr", "li", "summary", "div", "section", "article", "figcaption", "figure", "dt", "dd"}
UNREAD = {"script", "style", "svg", "title", "head"}
PICTURES = {"video", "img", "svg"}


def read_page(page: str) -> str:
    """The text of an HTML page."""
    reader = _Reader()
    reader.feed(page)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(reader.parts).split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.unread = 0  # elements around this place whose text nobody reads

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in PICTURES and not self.unread:
            self.parts.append(f" [{tag}] ")
        if tag in UNREAD:
            self.unread += 1
        self.parts.append("\n" if tag in BLOCKS else " ")

    def handle_endtag(self, tag: str) -> None:
        if tag in UNREAD:
            self.unread -= 1
        self.parts.append("\n" if tag in BLOCKS else " ")

    def handle_data(self, data: str) -> None:
        if not self.unread:
            self.parts.append(data.replace("\n", " "))
