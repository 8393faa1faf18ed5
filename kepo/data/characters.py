"""What the characters of a text amount to: an answer's letter, or nothing that can be seen."""

from __future__ import annotations

import re
import unicodedata

_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)[.:]?|([A-Za-z])[.:)]?)\s*")
# Letters and signs by their category, which are drawn as nothing: fillers of Hangul, the empty
# pattern of Braille, a note without a head, and the place of an object that is not there.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159"


def letter_of(text: str) -> str | None:
    """The capital letter if the text is only that of an option: ``b``, ``B.``, ``B)``, ``B:``,
    ``(B)``; else None.

    Data and completions are read by this one rule. Only A to Z are letters, not their likenesses in
    other scripts.
    """
    match = _LETTER.fullmatch(text)
    return (match[1] or match[2]).upper() if match else None


def shows_something(text: str) -> bool:
    """Whether a character of the text can be seen.

    Spaces, control and format characters, unassigned ones and marks are none, for a mark is seen on
    the letter that it belongs to.
    """
    return any(unicodedata.category(c)[0] not in "ZCM" and c not in _BLANKS for c in text)
