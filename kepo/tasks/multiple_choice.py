"""Questions with options, two to 26 of them, of which one is right; answered by its letter.

All texts are built without templates unless one is set, so braces in them are safe.
"""

from __future__ import annotations

from kepo.data.characters import letter_of
from kepo.data.example import LETTERS, Example
from kepo.tasks.leaks import states_answer
from kepo.tasks.task import Task


class MultipleChoice(Task):
    """The task whose answers are letters of options.

    ``b``, ``B.``, ``B)``, ``B:`` and ``(B)`` are the letter B.
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
        said = super().answer_of(text)
        return None if said is None else letter_of(said)

    def chance(self, example: Example) -> float:
        return 1 / len(example.options)

    def gives_away(self, hint: str, example: Example) -> bool:
        """Return whether a hint states an answer (`kepo.tasks.leaks`)."""
        return states_answer(hint, example)
