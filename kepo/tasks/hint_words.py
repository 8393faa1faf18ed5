"""Read a hint as words, in whatever characters they are written, and find numbers among them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass


def words_of(text: str) -> frozenset[str]:
    """Return the words of a list that is written as one string."""
    return frozenset(text.split())


NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
SENTENCE = frozenset(".!?;\n")
"""Marks that end a sentence."""
CLAUSE = SENTENCE | frozenset(":,")
"""Marks that end a clause."""
REACH = 60
"""The number of a sentence's words that are read on either side of what it names."""

_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+|[+%]+")
_IDEOGRAPH = re.compile("([\u1100-\u11ff\u2e80-\u9fff])")
_STRUCK = re.compile(r"~~([^~\n]+)~~")
_LETTER_SIGN = re.compile(r"(?:LATIN (?:CAPITAL|SMALL)|INDICATOR SYMBOL) LETTER ([A-Z])$")
_TICKS = dict.fromkeys("\u2713\u2714\u2611\u2705", ": correct, ") | dict.fromkeys(
    "\u2717\u2718\u2716\u2612\u274c\u274e", ": wrong, "
)
_EMPHASIS = re.compile(r"</?(?:b|i|u|s|p|em|strong|code|span)>", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(r"\bper ?cent\b", re.IGNORECASE | re.ASCII)
_CONTRACTED = re.compile(r"n['’]t\b", re.IGNORECASE | re.ASCII)
_WRAPS = {"(": ")", "[": "]", "{": "}", "<": ">", "“": "”", "‘": "’", "«": "»"} | {
    mark: mark for mark in "\"'*_`$"
}


@dataclass(frozen=True)
class Words:
    """A text as its words, case folded, and the gaps around them."""

    words: tuple[str, ...]
    raw: tuple[str, ...]
    """The words in their own case."""
    gaps: tuple[str, ...]
    """The spaces and punctuation: ``gaps[i]`` before word i, and the last after the last word."""

    def __len__(self) -> int:
        return len(self.words)

    def at(self, place: int) -> str:
        """Return the word at ``place``; "" beyond either end."""
        return self.words[place] if 0 <= place < len(self) else ""


def read(text: str) -> Words:
    """Read a text without the accents, invisible characters and typographic forms that hide words.

    Letters and digits in circles and squares become plain ones, ticks and crosses the words
    "correct" and "wrong", and what is struck out is denied.
    """
    plain = "".join(map(_plain, unicodedata.normalize("NFKD", text)))
    plain = _STRUCK.sub(r" not \1, ", plain)
    if "</" in plain:
        plain = _EMPHASIS.sub("", plain)
    plain = _PERCENT.sub("%", _CONTRACTED.sub(" not", plain))
    plain = _IDEOGRAPH.sub(r" \1 ", plain)  # each is a word: no space parts it from a letter
    found = list(_WORD.finditer(plain))
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(plain)]
    raw = tuple(match.group() for match in found)
    gaps = tuple(plain[start:end] for start, end in zip(starts, ends, strict=True))
    return Words(tuple(map(str.casefold, raw)), raw, gaps)


def number(word: str) -> float | None:
    """Return the number that a word gives in digits, as one of `NUMBERS`, or as a sign such as the
    Chinese seven; None if it gives none."""
    if word in NUMBERS:
        return float(NUMBERS.index(word))
    if len(word) == 1 and not word.isdecimal():
        return unicodedata.numeric(word, None)
    plain = word.replace(",", "")
    # float reads any script's digits, as it should, and words such as "nan", as it should not.
    return float(plain) if plain[:1].isdecimal() and re.fullmatch(r"\d+(\.\d+)?", plain) else None


def _plain(character: str) -> str:
    """Return a character of a text in NFKD as letters, digits or words; "" if it is not seen
    alone."""
    if character.isascii():
        return character
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf"):
        return ""
    if category == "So" and (sign := _LETTER_SIGN.search(unicodedata.name(character, ""))):
        return f" {sign[1]} "
    if category == "No" and (digit := unicodedata.digit(character, None)) is not None:
        return str(digit)
    return _TICKS.get(character, character)


def clause_around(text: Words, start: int, end: int, marks: frozenset[str]) -> tuple[int, int, str]:
    """Return ``(first word, word after the last, marks that end it)`` of the clause between
    ``marks`` around words ``start`` to ``end``; REACH words to either side are read."""
    first, last = max(0, start - REACH), min(len(text), end + REACH)
    while start > first and not set(text.gaps[start]) & marks:
        start -= 1
    while end < last and not set(text.gaps[end]) & marks:
        end += 1
    return start, end, text.gaps[end]


def closes(text: Words, place: int) -> bool:
    """Return whether a clause ends after the word at ``place``."""
    return place + 1 >= len(text) or bool(text.gaps[place + 1].strip(" \t\"'*_`"))


def wrapped(text: Words, place: int) -> bool:
    """Return whether the word at ``place`` has brackets, quotes or emphasis of its own."""
    opening, closing = text.gaps[place][-1:], text.gaps[place + 1][:1]
    return opening in _WRAPS and closing == _WRAPS[opening]
