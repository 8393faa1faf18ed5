"""Prompts made of an example by its task: the question, with a hint or without, and the request for
a hint."""

from __future__ import annotations

from kepo.data.example import Example
from kepo.models.encoding import Prompt
from kepo.tasks.task import Messages, Task


def prompt_of(
    task: Task, example: Example, hint: str | None = None, *, gives_answer: bool = False
) -> Prompt:
    """Return the prompt that asks the policy a question.

    hint: a hint that is shown with the question. gives_answer: show the right answer with the hint.
    """
    chat = task.messages(example)
    if hint is not None:
        told = f"\n{task.answer_sentence(example)}" if gives_answer else ""
        chat = task.with_hint(chat, f"{hint}{told}")
    return _prompt(chat, example)


def hint_prompt(task: Task, example: Example, *, with_answer: bool) -> Prompt:
    """Return the prompt that asks the teacher for a hint; ``with_answer`` tells it the answer."""
    return _prompt(task.hint_request(example, with_answer=with_answer), example)


def _prompt(chat: Messages, example: Example) -> Prompt:
    *earlier, last = chat
    turns = tuple((turn["role"], turn["content"]) for turn in earlier)
    return Prompt(last["content"], example.images, turns)
