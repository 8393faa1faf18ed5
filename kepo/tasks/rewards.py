"""What a completion earns: functions of its text and the right letter, and nothing else.

The parser reads generated text, so it assumes bad faith: an answer counts only if there is exactly
one answer block, it is the last thing said, it stands outside the reasoning, and it holds one
letter.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from kepo.errors import KepoRewardError

Reward = Callable[[str, str], float]


def accuracy(text: str, answer: str) -> float:
    """1.0 if the one answer block of ``text`` holds the letter ``answer``, else 0.0."""
    return float(parse_answer(text) == answer)


def format(text: str, answer: str) -> float:
    """1.0 if ``text`` is ``<think>...</think><answer>X</answer>`` and nothing around it, else
    0.0.

    There must be something to read between the tags of the first block: spaces, or characters that
    show nothing, are no reasoning.
    """
    parts = _split(text)
    if parts is None or _letter(parts[2]) is None:
        return 0.0
    before, reasoning, _ = parts
    return float(before == "" and reasoning is not None and _is_readable(reasoning))


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format}
"""Rewards by the name that configs, gates and logs use. Add your own function here."""


def parse_answer(text: str) -> str | None:
    """The letter of the one well-formed answer block, upper case; None if there is no such block.

    None, too, for a second or unclosed tag, for an answer inside the reasoning, for text after the
    block, and for anything in it but one letter A to Z ("b", " B " and "B." are the letter B).
    """
    parts = _split(text)
    return None if parts is None else _letter(parts[2])


def score(names: Sequence[str], text: str, answer: str, example_id: str) -> dict[str, float]:
    """Every reward of ``names`` for one completion.

    A number is a Python, NumPy or torch one, a bool among them, or an array or tensor without
    dimensions. Raises KepoRewardError, which names reward and example, if a reward fails or returns
    anything else, None, NaN and infinities included: a made-up reward would train the model on
    nonsense in silence.
    """
    scores = {}
    for name in names:
        try:
            value = REWARDS[name](text, answer)
        except Exception as error:
            raise KepoRewardError(
                f"rewards: {name!r} raised {type(error).__name__} on example {example_id!r}: "
                f"{error}"
            ) from error
        number = _number(value)
        if number is None:
            shown = " ".join(reprlib.repr(value).split())
            raise KepoRewardError(
                f"rewards: {name!r} returned {shown} on example {example_id!r}; expected a finite "
                "number, one for each completion"
            )
        scores[name] = number
    return scores


def _number(value: Any) -> float | None:
    """``value`` as a float; None if it is not one finite number."""
    if hasattr(value, "shape"):  # of NumPy or torch
        if tuple(value.shape) != ():
            return None
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        return None
    return number if math.isfinite(number) else None


def _split(text: str) -> tuple[str, str | None, str] | None:
    """(text before everything, reasoning or None, content of the answer block), or None if
    malformed."""
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


def _letter(content: str) -> str | None:
    letter = content.strip().removesuffix(".")
    # Judged before it is made a capital: "ı" and "ſ" become I and S by that.
    good = len(letter) == 1 and letter.isascii() and letter.isalpha()
    return letter.upper() if good else None


def _is_readable(text: str) -> bool:
    """Whether there is a character to be seen in it."""
    return any(c.isprintable() and not c.isspace() and c not in _BLANKS for c in text)


_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # printable by their category, and empty
