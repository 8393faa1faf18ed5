"""Find the reasoning, the answer and the hint in what a model wrote.

The parser reads generated text, so it assumes bad faith: an answer counts only if there is exactly
one answer block, it is the last thing said, and it stands outside the reasoning; without any answer
tag, if there is exactly one ``\\boxed{}`` outside the reasoning.
"""

from __future__ import annotations

import re

from kepo.data.characters import shows_something
from kepo.data.solutions import in_words

_HINT = re.compile(r"<hint>(.*?)</hint>", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*\{")


def said_answer(text: str) -> str | None:
    """Return what ``text`` says the answer is, stripped; None if it gives none, or several.

    It is the inside of the one answer block, which may be a box itself, or of the one box.
    """
    if "<answer>" in text or "</answer>" in text:
        parts = split_blocks(text)
        if parts is None:
            return None
        content = parts[2].strip()
        alone = content.strip("$. \n")
        return boxed(alone) if _BOX.match(alone) and alone.endswith("}") else content
    spoken = _after_reasoning(text)
    return None if spoken is None else boxed(spoken)


def boxed(text: str) -> str | None:
    """Return the inside of the one ``\\boxed{}`` in ``text``, stripped; None if it has none, more
    than one, or one whose braces do not close."""
    found = list(_BOX.finditer(text))
    if len(found) != 1:
        return None
    start, depth = found[0].end(), 1
    for place in range(start, len(text)):
        if text[place - 1] == "\\":
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return in_words(text[start:place].strip())
    return None


def split_blocks(text: str) -> tuple[str, str | None, str] | None:
    """Return (text before the first tag, reasoning or None, content of the answer block); None if
    the text is malformed."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    head, _, rest = text.partition("<answer>")
    content, closed, tail = rest.partition("</answer>")
    if not closed or tail.strip():
        return None
    opens, closes = text.count("<think>"), text.count("</think>")
    if opens == closes == 0:
        return head.strip(), None, content
    if opens == 0 and closes == 1:  # opened elsewhere: no format, but the answer stands outside
        reasoning, ended, between = head.partition("</think>")
        return (head.strip(), None, content) if ended and not between.strip() else None
    before, opened, thought = head.partition("<think>")
    reasoning, ended, between = thought.partition("</think>")
    if opens != 1 or closes != 1 or not opened or not ended or between.strip():
        return None
    return before.strip(), reasoning, content


def hint_in(text: str) -> str | None:
    """Return the inside of the one ``<hint>...</hint>`` in ``text``, stripped; it may span lines.

    None if there is no such pair, more than one, an unmatched tag, or nothing to be seen inside.
    """
    if text.count("<hint>") != 1 or text.count("</hint>") != 1:
        return None
    match = _HINT.search(text)
    return match[1].strip() if match and shows_something(match[1]) else None


def _after_reasoning(text: str) -> str | None:
    """Return what is said after the reasoning; None if that does not end, or there are several."""
    opens, closes = text.count("<think>"), text.count("</think>")
    if opens > closes or closes > 1:
        return None
    return text.rpartition("</think>")[2]
