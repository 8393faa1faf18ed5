"""What the readers of every layout share: JSON lists, fields, the right option, naming what is
wrong.

A reader is two functions. ``rows(path)`` yields ``(where, record)``, a BadRecord standing in for a
record that could not even be read; ``parse(record, where)`` makes of a record an Example without
its images, and where those are: paths as the dataset writes them, or a function that fetches those
or the files' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.example import LETTERS, Example

KINDS = (
    "file",
    "field",
    "options",
    "answer",
    "duplicate id",
    "image outside",
    "image missing",
    "image unreadable",
    "text refused",
    "image refused",
    "prompt too long",
)
"""What can be wrong with a record, in the order in which it is looked for."""

Sources = Sequence[str] | Callable[[], Sequence[str | bytes]]
Parsed = tuple[Example, Sources]


class BadRecord(Exception):
    """Between a reader and the loader: what is wrong with one record."""

    def __init__(self, kind: str, message: str):
        assert kind in KINDS, kind
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Problem:
    """What is wrong with one record, and which it is."""

    kind: str
    where: str
    """File and index in it."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def read_list(file: Path) -> list[tuple[str, Any]]:
    """``(where, record)`` of a JSON list; one BadRecord if the file is none."""
    try:
        # -sig: a file saved on Windows may begin with a byte-order mark.
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return [(str(file), BadRecord("file", f"not readable JSON: {error}"))]
    if not isinstance(content, list):
        found = f"holds a {type(content).__name__}; expected a list of objects"
        return [(str(file), BadRecord("file", found))]
    return [(f"{file}[{index}]", record) for index, record in enumerate(content)]


def fields_of(record: Any) -> dict[str, Any]:
    """The record if it is an object."""
    if not isinstance(record, dict):
        raise BadRecord("field", f"is a {type(record).__name__}; expected an object")
    return record


def text(record: dict[str, Any], key: str, kind: str = "field") -> str:
    """``record[key]``, which must be text with something in it."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(kind, f"{key}={value!r}; expected a non-empty string")
    return value


def right_letter(answer: str, options: tuple[str, ...]) -> str:
    """Letter of the one option that equals the answer but for case, spaces and a final period."""
    wanted = plain(answer)
    matches = [
        letter for letter, option in zip(LETTERS, options, strict=False) if plain(option) == wanted
    ]
    if len(matches) != 1:
        raise BadRecord(
            "answer",
            f"the answer {answer!r} equals {len(matches)} of the options {options}; expected "
            "exactly one",
        )
    return matches[0]


def plain(words: str) -> str:
    return " ".join(words.split()).rstrip(". ").casefold()
