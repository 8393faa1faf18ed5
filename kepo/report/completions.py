"""The completions that the page shows, by question, and their pictures as small data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kepo.data.images import open_rgb
from kepo.disk.files import printable
from kepo.errors import KepoDataError
from kepo.report.collect import RunRecord, number, numbers

MOST_CHARACTERS = 20_000
"""The most characters of one text that the page holds."""
SIDE = 320
"""The longest side of a picture on the page, in pixels."""


def browsed(runs: Sequence[RunRecord], most: int, picture_bytes: int) -> dict[str, Any]:
    """Return the groups of completions as JSON, with the pictures that fit ``picture_bytes``.

    most: the number of completions of all runs. Whole steps are kept, spread evenly with the first
    and the last among them; of a single step that is too long, its first completions.
    """
    kept, notes = [], []
    for place, run in enumerate(runs):
        records = spread(run.completions, most // len(runs))
        kept += [(place, record) for record in records]
        if len(records) < len(run.completions):
            steps = len({record["step"] for record in records})
            notes.append(
                f"{run.name}: {len(records):,} of {len(run.completions):,} logged completions are "
                f"here, of {steps} steps spread over the run."
            )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    pictures = Pictures(picture_bytes)
    for place, record in sorted(kept, key=lambda one: -one[1]["step"]):
        paths = record.get("images")
        shown = tuple(map(str, paths)) if isinstance(paths, list) else ()
        key = (place, record["step"], record["prompt"], shown)
        if key not in groups:
            groups[key] = {
                "run": place,
                "step": record["step"],
                "prompt": _short(record["prompt"]),
                "answer": _short(str(record.get("answer", ""))),
                "images": [pictures.add(path) for path in shown],
                "items": [],
            }
        groups[key]["items"].append(_item(record))
    if pictures.left:
        notes.append(
            f"{pictures.left:,} of {len(pictures.places):,} pictures are left out: "
            f"the page holds at most {picture_bytes / 1e6:g} MB of them (--picture-mb)."
        )
    if pictures.faults:
        notes.append(
            f"{pictures.faults:,} pictures cannot be read on this machine; their file names stand "
            "in their place."
        )
    return {"groups": [*groups.values()], "pictures": pictures.uris, "notes": notes}


def spread(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most ``most`` records: those of as many whole steps as fit, spread evenly."""
    if len(records) <= most:
        return [*records]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_step.setdefault(record["step"], []).append(record)
    steps = sorted(by_step)
    for count in range(len(steps) - 1, 1, -1):
        chosen = {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}
        if sum(len(by_step[step]) for step in chosen) <= most:
            return [record for record in records if record["step"] in chosen]
    return by_step[steps[-1]][:most]


def _item(record: dict[str, Any]) -> dict[str, Any]:
    rewards = numbers(record.get("rewards"))
    accuracy, hint = rewards.get("accuracy"), record.get("hint")
    return {
        "text": _short(record["completion"]),
        "right": None if accuracy is None else accuracy >= 1,
        "rewards": rewards,
        "advantage": number(record.get("advantage")),
        "gate": number(record.get("gate")),
        "hint": None if hint is None else _short(str(hint)),
        "cut": record.get("truncated") is True,
        "data": record.get("from_data") is True,
    }


def _short(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} [and {len(text) - MOST_CHARACTERS:,} more characters]"


class Pictures:
    """Small copies of pictures, each once, up to a number of bytes."""

    def __init__(self, most: int):
        self.room = most
        self.uris: list[str] = []
        self.places: dict[str, dict[str, Any]] = {}
        """What the page knows of each path: its file's name, and its place in ``uris`` or why it
        has none."""
        self.left = self.faults = 0

    def add(self, path: str) -> dict[str, Any]:
        if path not in self.places:
            self.places[path] = {"name": printable(Path(path).name), **self._made(path)}
        return self.places[path]

    def _made(self, path: str) -> dict[str, Any]:
        if self.room <= 0:
            self.left += 1
            return {"why": "left out to keep the page small"}
        try:
            uri, size = small(Path(path))
        except (KepoDataError, ValueError) as error:
            self.faults += 1
            return {"why": _short(printable(error))}
        if len(uri) > self.room:
            self.left += 1
            self.room = 0
            return {"why": "left out to keep the page small"}
        self.room -= len(uri)
        self.uris.append(uri)
        return {"place": len(self.uris) - 1, "width": size[0], "height": size[1]}


def small(path: Path) -> tuple[str, tuple[int, int]]:
    """Return a picture as a data URI, its longest side at most SIDE pixels, and its size.

    Raises KepoDataError for a file that is no picture.
    """
    image = open_rgb(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    found = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        content = io.BytesIO()
        image.save(content, kind, **settings)
        found.append((len(content.getvalue()), kind, content.getvalue()))
    _, kind, smallest = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(smallest).decode('ascii')}", image.size
