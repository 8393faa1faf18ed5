"""Helpers that the readers of all layouts share: read JSON lists and fields, find the right option,
and name what is wrong.

A reader is two functions. ``rows(path)`` yields ``(where, record)``, with a BadRecord in place of a
record that could not even be read. ``parse(record, where)`` turns a record into an Example without
its images, and the sources of these: paths as the dataset writes them, or a function that fetches
the paths or the files' bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.data.characters import (
    composed,
    letter_and_text,
    letter_of,
    shows_something,
    unmarked,
)
from kepo.data.example import LETTERS, Example
from kepo.disk.files import printable, read_regular

KINDS = (
    "file",
    "line",
    "field",
    "options",
    "answer",
    "duplicate id",
    "image outside",
    "image missing",
    "image unreadable",
    "no teacher",
    "task",
    "text refused",
    "image refused",
    "prompt too long",
)
"""The kinds of problems that a record can have, in the order in which they are looked for; a file
that cannot be read, or that holds nothing, is no record."""

_UNFIT = re.compile("[\0\ud800-\udfff]")
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")

Sources = Sequence[str | bytes] | Callable[[], Sequence[str | bytes]]
Parsed = tuple[Example, Sources]


class BadRecord(Exception):
    """An error by which a reader tells the loader what is wrong with one record."""

    def __init__(self, kind: str, message: str):
        assert kind in KINDS, kind
        super().__init__(printable(message))
        self.kind = kind


@dataclass(frozen=True)
class RecordProblem:
    """A problem with one record, and which record it is."""

    kind: str
    where: str
    """The file, and the record's index in it."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def counted(counts: Mapping[str, int]) -> str:
    """Return how many bad records and files there are, by the number of each kind."""
    files = counts.get("file", 0)
    numbers = {"records": sum(counts.values()) - files, "files": files}
    return " and ".join(f"{count} bad {name}" for name, count in numbers.items() if count)


def read_list(file: Path) -> list[tuple[str, Any]]:
    """Return ``(where, record)`` for each record of a JSON list; one BadRecord if it is no list.

    An object that has a key twice is replaced by a BadRecord: nobody can tell which of the two is
    meant.
    """
    name = printable(file)
    try:
        content = parsed(read_regular(file))
    except UNPARSED as error:
        return [(name, BadRecord("file", f"not readable JSON: {error}"))]
    if not isinstance(content, list):
        kind = "dict" if isinstance(content, BadRecord) else type(content).__name__
        return [(name, BadRecord("file", f"holds a {kind}; expected a list of objects"))]
    return [(f"{name}[{index}]", record) for index, record in enumerate(content)]


UNPARSED = (OSError, ValueError, RecursionError, MemoryError)
"""What reading a file and `parsed` may raise."""


def parsed(content: bytes) -> Any:
    """Parse JSON. An object that has a key twice becomes a BadRecord, and so does every object that
    such a one stands in."""
    if not content.strip():
        raise ValueError("the file is empty")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("the file is UTF-16; save it as UTF-8")
    # -sig: a file saved on Windows may begin with a byte-order mark.
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRecord:
    for _, value in pairs:
        if (bad := _bad_within(value)) is not None:
            return bad
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return BadRecord("field", f"has the keys {shown(twice)} more than once; expected each once")


def _bad_within(value: Any) -> BadRecord | None:
    if isinstance(value, BadRecord):
        return value
    if isinstance(value, list):
        return next(filter(None, map(_bad_within, value)), None)
    return None


def fields_of(record: Any) -> dict[str, Any]:
    """Return the record if it is an object; raises BadRecord otherwise."""
    if not isinstance(record, dict):
        raise BadRecord("field", f"is a {type(record).__name__}; expected an object")
    return record


def text(record: dict[str, Any], key: str, kind: str = "field") -> str:
    """Return ``record[key]``, which must be visible text that can be stored and tokenised.

    Lone surrogates, which no encoding has, and NUL cannot.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(kind, f"{key}={shown(value)}; expected a non-empty string")
    if odd := _UNFIT.search(value):
        raise BadRecord(
            kind,
            f"{key}={shown(value)} has the character {odd[0]!r}; expected text as UTF-8 has it",
        )
    require_visible(key, value, kind)
    return value


def require_visible(name: str, words: str, kind: str) -> None:
    """Raise BadRecord for a text of characters that show nothing."""
    if not shows_something(words):
        raise BadRecord(kind, f"{name}={words!a} has no character that can be seen; expected text")


def one_line(record: dict[str, Any], key: str) -> str:
    """Return ``record[key]`` as text for logs and tables: without control characters."""
    value = text(record, key)
    if odd := _CONTROL.search(value):
        raise BadRecord(
            "field", f"{key}={shown(value)} has the character {odd[0]!r}; expected a line of text"
        )
    return value


def shown(value: object) -> str:
    """Return the value's ``repr``, cut in the middle if it is long."""
    words = repr(value)
    return words if len(words) <= 300 else f"{words[:200]} ... {words[-50:]}"


def right_letter(answer: str | int, options: tuple[str, ...]) -> str:
    """Return the letter of the option that the dataset's answer means by text, letter, or both.
    A number that is no option's text is the place of one: 0 is option A.

    Texts are compared without case, spaces and a final period. A letter alone is read as in a
    model's answer (``characters.letter_of``). A text may follow it, as in ``B) MR``, which must
    then be that option's. What is none of these is read without Markdown's and LaTeX's marks, as
    ``**B**``. Raises BadRecord if no option is meant, or more than one, as when option A reads "B".
    """
    wanted = plain(str(answer))
    pairs = list(zip(LETTERS, options, strict=False))
    found = {letter for letter, option in pairs if plain(option) == wanted}
    if isinstance(answer, int):
        found = found or {_at(answer, options)}
    else:
        found |= _lettered(answer, options) or (
            set() if found else _lettered(unmarked(answer), options)
        )
    # The right option's text must be no other's: a model that gives the other is right as well.
    texts = {plain(option) for letter, option in pairs if letter in found}
    found |= {letter for letter, option in pairs if plain(option) in texts}
    if len(found) != 1:
        raise BadRecord(
            "answer",
            f"the answer {shown(answer)} equals {len(found)} of the options {shown(options)}; "
            "expected exactly one, by text or letter",
        )
    return found.pop()


def _at(place: int, options: tuple[str, ...]) -> str:
    if not 0 <= place < len(options):
        raise BadRecord(
            "answer",
            f"the answer {place} is the text of none of the {len(options)} options, and as a place "
            f"among them out of range; expected 0 to {len(options) - 1}, or a letter",
        )
    return LETTERS[place]


def _lettered(answer: str, options: tuple[str, ...]) -> set[str]:
    """Return the letter that the answer gives, alone or before its option's text."""
    letters = LETTERS[: len(options)]
    if letter := letter_of(answer):
        return {letter} & {*letters}
    told = letter_and_text(answer)
    return {told[0]} if told and is_of_option(told[0], told[1], options) else set()


def is_of_option(letter: str, text: str, options: Sequence[str]) -> bool:
    """Return whether a text is that of the option with this letter, but for case, spaces, marks, a
    final period and accents written apart."""
    place = LETTERS.index(letter)
    return place < len(options) and plain(unmarked(options[place])) == plain(unmarked(text))


_TOLD = re.compile(
    r"""
    \b(?:answer|ans|right\ option|correct\ (?:answer|option|choice))\s*(?:is\b|[:=])
    | \b(?:key|solution|option)\s*(?:is\b|[:=])\W*[a-z]\b\W*$
    | \bcorrect\ (?:answer|option|choice)\b
    | [(\[{]\s*(?:correct|(?:the\s+)?(?:right\ )?answer)\s*[)\]}]
    | [\u2705\u2713\u2714\u2611]
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""The ways in which an option tells the right one: "Answer: B" after the last, or a mark at it."""
_TOLD_IN_QUESTION = re.compile(
    r"\b[Aa](?:nswer|NSWER|ns|NS)\s*(?:is\b|[:=])\W*(?:[Oo]ption\s+)?[A-Z]\b(?!\w|[ )]*[A-Za-z])"
)


def require_untold(question: str, options: Sequence[str]) -> None:
    """Raise BadRecord if question or options tell the answer, as the student would read it."""
    starred = [
        option for option in options if option.strip()[:1] == "*" or option.strip()[-1:] == "*"
    ]
    if len(starred) == 1:
        raise BadRecord(
            "options",
            f"one option alone has a star, {shown(starred[0])}, which may mark the answer",
        )
    for letter, option in zip(LETTERS, options, strict=False):
        if told := _TOLD.search(unicodedata.normalize("NFKC", option)):
            raise BadRecord(
                "options",
                f"option {letter} {shown(option)} has {told[0]!r}, which states the answer; "
                "expected an option's own text",
            )
    if told := _TOLD_IN_QUESTION.search(unicodedata.normalize("NFKC", question)):
        raise BadRecord(
            "field",
            f"the question {shown(question)} has {told[0]!r}, which states the answer; expected "
            "none",
        )


def repeated(options: Sequence[str]) -> bool:
    """Return whether two options are the same, which does no harm among wrong ones."""
    return len({plain(option) for option in options}) < len(options)


def plain(words: str) -> str:
    return " ".join(composed(words).split()).rstrip(". ").casefold()
