"""The rewards of a completion: functions of its text and the right letter, and of nothing else.

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

from kepo.data.characters import letter_of, shows_something
from kepo.errors import KepoRewardError

Reward = Callable[[str, str], float]


def accuracy(text: str, answer: str) -> float:
    """Return 1.0 if the one answer block of ``text`` holds the letter ``answer``, else 0.0."""
    return float(parse_answer(text) == answer)


def format(text: str, answer: str) -> float:
    """Return 1.0 if ``text`` is ``<think>...</think><answer>X</answer>`` with nothing around it,
    else 0.0.

    The first block must hold something to read: spaces, or characters that show nothing, are no
    reasoning.
    """
    parts = _split(text)
    if parts is None or letter_of(parts[2]) is None:
        return 0.0
    before, reasoning, _ = parts
    return float(before == "" and reasoning is not None and shows_something(reasoning))


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format}
"""The rewards, by the names that configs, gates and logs use. Add your own function here."""


def parse_answer(text: str) -> str | None:
    """Return the upper-case letter of the one well-formed answer block; None if there is none.

    A second or unclosed tag, an answer inside the reasoning, text after the block, and anything in
    it but one letter A to Z also give None ("b", " B ", "B.", "B)" and "(B)" are the letter B).
    """
    parts = _split(text)
    return None if parts is None else letter_of(parts[2])


def score(names: Sequence[str], text: str, answer: str, example_id: str) -> dict[str, float]:
    """Return the rewards in ``names`` of one completion, by name.

    A reward must be a Python, NumPy or torch number, which may be a bool, or an array or tensor
    without dimensions. Raises KepoRewardError, which names reward and example, if a reward function
    fails or returns anything else, None, NaN and infinities included: a made-up reward would
    silently train the model on nonsense.
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
    """Return ``value`` as a float; None if it is not one finite number."""
    if hasattr(value, "shape"):  # a NumPy or torch value
        if tuple(value.shape) != ():
            return None
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return None
    return number if math.isfinite(number) else None


def _split(text: str) -> tuple[str, str | None, str] | None:
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
