"""The completions of a step as a table: flat rows, and small copies of their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from kepo.data.images import open_rgb
from kepo.errors import KepoDataError

SIDE = 256
"""The longest side of a picture in a tracker, in pixels: enough to recognise it."""


@dataclass(frozen=True)
class Table:
    """Completions of one step in rows; the pictures apart, since several completions show one."""

    columns: list[str]
    rows: list[list[Any]]
    """Of each completion the values of ``columns``; None where a completion has no such value."""
    shown: list[list[str]]
    """Of each completion the names of its pictures."""
    pictures: dict[str, Image]
    """Each picture by its name, at most ``SIDE`` pixels wide and high. One that can no longer be
    read is missing."""

    @property
    def most_shown(self) -> int:
        """The largest number of pictures that a completion has."""
        return max(map(len, self.shown), default=0)


def table_of(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return records of completions.jsonl as a table; rewards get a column each."""
    flat = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    paths = [list(record.get("images", ())) for record in records]
    pictures = {}
    for path in dict.fromkeys(path for each in paths for path in each):
        picture = small(path)
        if picture is not None:
            pictures[path] = picture
    return Table(columns, [[row.get(name) for name in columns] for row in flat], paths, pictures)


def small(path: str) -> Image | None:
    """Return a copy of the picture within ``SIDE`` pixels; None if it can no longer be read."""
    try:
        picture = open_rgb(Path(path))
    except KepoDataError:
        return None
    picture.thumbnail((SIDE, SIDE))
    return picture


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            row |= {f"{name}/{key}": each for key, each in value.items()}
        elif name != "images":
            row[name] = value
    return row
