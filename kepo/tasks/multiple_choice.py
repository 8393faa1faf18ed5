"""Questions with options, two to 26 of them, of which one is right; answered by its letter.

All texts are built without templates unless one is set, so braces in them are safe.
"""

from __future__ import annotations

import re

from kepo.data.characters import letter_and_text, letter_of, unmarked
from kepo.data.example import LETTERS, Example
from kepo.data.records import is_of_option
from kepo.tasks.blocks import said_answer
from kepo.tasks.leaks import states_answer
from kepo.tasks.task import Task

_ANOTHER = re.compile(r"(?:\b(?:or|and|not)\s|[,;/&(])\s*\(?[A-Z]\b|(?<=\s)[A-Za-z][.):](?:\s|$)")
"""A second letter in an answer."""


class MultipleChoice(Task):
    """The task whose answers are letters of options.

    ``b``, ``B.``, ``B)``, ``B:``, ``(B)``, ``**B**`` and ``\\text{B}`` are the letter B, and so is
    ``B. MR`` if MR is the text of option B. An answer with two letters is none.
    """

    instruction = "Reply as <think>reasoning</think><answer>letter</answer>."

    def check(self, example: Example) -> str | None:
        if not example.options:
            return "has no options, which task: multiple_choice asks about; see task: open_answer"
        if example.answer not in LETTERS[: len(example.options)]:
            return f"has the answer {example.answer!r}, which is no letter of its options"
        return super().check(example)

    def question(self, example: Example) -> str:
        """Return the question and its options, one per line."""
        pairs = zip(LETTERS, example.options, strict=False)
        return "\n".join([example.question, *(f"{letter}. {text}" for letter, text in pairs)])

    def answer_of(self, text: str) -> str | None:
        said = unmarked(super().answer_of(text) or "")
        told = letter_and_text(said)
        if told is None:
            return letter_of(said)
        return None if letter_of(told[1]) or _ANOTHER.search(told[1]) else told[0]

    def is_right(self, text: str, example: Example) -> bool:
        if not super().is_right(text, example):
            return False
        told = letter_and_text(unmarked(said_answer(text) or ""))
        return told is None or is_of_option(*told, example.options)

    def chance(self, example: Example) -> float:
        return 1 / len(example.options)

    def gives_away(self, hint: str, example: Example) -> bool:
        """Return whether a hint states an answer (`kepo.tasks.leaks`)."""
        return states_answer(hint, example)
