"""Tasks that are controls: what a method is worth if a part of it says something else."""

from __future__ import annotations

from kepo.rollout.questions import seed_of
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.task import Messages


class OtherDigits(MultipleChoice):
    """The digits' task, with every hint replaced by one about other digits.

    The digits are drawn by a hash of the question's text, uniformly as those of the questions are:
    a hint says what the hint of another question would.
    """

    def with_hint(self, messages: Messages, hint: str) -> Messages:
        drawn = seed_of(messages[-1]["content"]) % 100
        return super().with_hint(messages, f"{drawn // 10} + {drawn % 10}")
