"""A page as a browser's parser sees it: its elements, its text, and the data for its script."""

import functools
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

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


def rewrite(file, change):
    """Change every record of a log."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        change(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def hostile_run(ended, tmp_path):
    """The run with PAYLOAD in every text that it holds, its folder's name among them."""
    run = shutil.copytree(ended, tmp_path / PAYLOAD.replace("/", "|")[:80])
    picture = tmp_path / f"{PAYLOAD.replace('/', '|')[:80]}.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    rewrite(run / "metrics.jsonl", lambda r: r.update(
        {key: {PAYLOAD: 0.5, "CT": 0.25} for key in ("eval", "eval_types") if key in r}
        | {PAYLOAD: 1.0, f"rewards/{PAYLOAD}/mean": 1.0, f"mem/{PAYLOAD}": 1.0}))  # fmt: skip
    rewrite(run / "completions.jsonl", lambda r: r.update(
        prompt=PAYLOAD, completion=PAYLOAD, hint=PAYLOAD, answer=PAYLOAD, images=[str(picture)],
        rewards={"accuracy": 1.0, PAYLOAD: 2.0}))  # fmt: skip
    data = json.loads((run / "data.json").read_text())
    data["train"] |= {"path": PAYLOAD, "layout": PAYLOAD, "bad_records": {PAYLOAD: 1},
                      "first_problems": [PAYLOAD], "quirks": {PAYLOAD: 1}}  # fmt: skip
    (run / "data.json").write_text(json.dumps(data))
    for state in run.glob("checkpoints/*/state.json"):
        values = json.loads(state.read_text())
        values["config"] |= {"student": PAYLOAD, "teacher": PAYLOAD, PAYLOAD: PAYLOAD}
        values["config"]["train_modalities"] = [PAYLOAD]
        state.write_text(json.dumps(values))
    return run
