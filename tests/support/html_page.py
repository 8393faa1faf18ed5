"""A page as a browser's parser sees it: its elements, its text, and the data for its script."""

import functools
import json
from html.parser import HTMLParser
from pathlib import Path

PAYLOAD = (
    "<a href='#'>y</a></script></style><xss onload=alert(1)>\"'><xss>&lt;<!--<script>"
    "\u2028\u2029{{ 7 * 7 }}${x}"
)
"""Text that is an element wherever it is not escaped: in markup, attributes, style or script."""


class Page(HTMLParser):
    """Of a file that `kepo report` wrote."""

    VOID = frozenset(("meta", "link", "input", "img", "br"))
    INLINE = frozenset(("b", "i", "span", "code"))

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.json = ""
        self._open: list[tuple[str, dict]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.text += "" if tag in self.INLINE else " "
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.json += text if attributes.get("id") == "page-data" else ""
        elif tag != "style":
            self.text += text

    @functools.cached_property
    def data(self) -> dict:
        return json.loads(self.json)

    @property
    def words(self) -> str:
        """Its visible text in single spaces."""
        return " ".join(self.text.split())

    def panel(self, title: str) -> dict:
        [found] = [one for one in self.data["curves"]["main"] if one["title"] == title]
        return found

    def series(self, title: str, name: str) -> dict:
        [found] = [one for one in self.panel(title)["series"] if one["name"] == name]
        return found

    @property
    def completions(self) -> list[dict]:
        return [item for group in self.data["browser"]["groups"] for item in group["items"]]
