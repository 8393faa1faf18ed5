"""Read characters: find an option's letter in a text, and texts that show nothing."""

from __future__ import annotations

import re
import unicodedata

_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])[.:]?\s*(\S.*)", re.DOTALL)
_SET = re.compile(r"\\(?:text|math|boxed|fbox|mbox)[a-z]*\s*\{([^{}]*)\}")
_MARKS = re.compile(r"[*_`$]|\\[()\[\]]")
_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)[.:]?|([A-Za-z])[.:)]?)\s*")
# Characters that are letters or signs by category but are drawn as nothing: Hangul fillers, the
# empty Braille pattern, a note without a head, and the placeholder of a missing object.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159"


def letter_of(text: str) -> str | None:
    """Return the capital letter if the text is only an option's letter, else None.

    ``b``, ``B.``, ``B)``, ``B:`` and ``(B)`` are such texts. Data and completions are read by this
    one rule. Only A to Z are letters, not their likenesses in other scripts.
    """
    match = _LETTER.fullmatch(text)
    return (match[1] or match[2]).upper() if match else None


def letter_and_text(text: str) -> tuple[str, str] | None:
    """Return the capital letter and the text behind it, as ``B`` and ``MR`` of ``B. MR``; None for
    a letter alone and for anything else."""
    match = _LETTER_AND_TEXT.fullmatch(text.strip())
    return ((match[1] or match[2]).upper(), match[3]) if match and letter_of(text) is None else None


def composed(text: str) -> str:
    """Return a text with each letter and its accents as one character where Unicode has one.

    Data may write them apart. A tokenizer such as Qwen's composes all that its model reads, so that
    the model answers with the composed text.
    """
    return unicodedata.normalize("NFC", text)


def unmarked(text: str) -> str:
    r"""Return a text without what Markdown and LaTeX set it with: ``B`` of ``**B**``, ``$B$`` and
    ``\text{B}``."""
    before = None
    while before != text:
        before, text = text, _SET.sub(r"\1", text)
    return _MARKS.sub("", text).strip()


def shows_something(text: str) -> bool:
    """Return whether the text has a character that can be seen.

    Spaces, control and format characters, unassigned characters and marks do not count; a mark is
    only seen on the letter that it belongs to.
    """
    return any(unicodedata.category(c)[0] not in "ZCM" and c not in _BLANKS for c in text)
