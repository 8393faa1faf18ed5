"""Prompts made of an example: the question, with a hint or without, and the request for a hint."""

from __future__ import annotations

from kepo.data.example import Example
from kepo.models.encoding import Prompt
from kepo.tasks.multiple_choice import hint_request, hinted_prompt, question_prompt


def prompt_of(example: Example, hint: str | None = None, *, gives_answer: bool = False) -> Prompt:
    """Return the prompt that asks the policy a question.

    hint: a hint that is shown with the question. gives_answer: show the right answer with the hint.
    """
    if hint is None:
        return Prompt(question_prompt(example), example.images)
    return Prompt(hinted_prompt(example, hint, gives_answer), example.images)


def hint_prompt(example: Example, *, with_answer: bool) -> Prompt:
    """Return the prompt that asks the teacher for a hint; ``with_answer`` tells it the answer."""
    return Prompt(hint_request(example, with_answer), example.images)
