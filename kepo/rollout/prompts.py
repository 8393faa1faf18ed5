"""Prompts made of an example by its task: the question, with a hint or without, and the request for
a hint."""

from __future__ import annotations

import reprlib
from typing import Any

from kepo.data.example import Example
from kepo.errors import KepoConfigError
from kepo.models.encoding import Prompt
from kepo.tasks.task import Messages, Task, errors_of


def prompt_of(
    task: Task, example: Example, hint: str | None = None, *, gives_answer: bool = False
) -> Prompt:
    """Return the prompt that asks the policy a question.

    hint: a hint that is shown with the question. gives_answer: show the right answer with the hint.
    """
    with errors_of(task, example):
        chat = task.messages(example)
        if hint is not None:
            told = f"\n{task.answer_sentence(example)}" if gives_answer else ""
            chat = task.with_hint(chat, f"{hint}{told}")
    return _prompt(chat, task, example)


def worked_answer(task: Task, example: Example) -> str:
    """Return the dataset's own solution as a completion."""
    with errors_of(task, example):
        text = task.worked_answer(example)
    if not isinstance(text, str):
        raise KepoConfigError(
            f"task={type(task).__name__!r} has the worked answer {reprlib.repr(text)} of example "
            f"{example.id!r}; expected a text"
        )
    return text


def hint_prompt(task: Task, example: Example, *, with_answer: bool) -> Prompt:
    """Return the prompt that asks the teacher for a hint; ``with_answer`` tells it the answer."""
    with errors_of(task, example):
        chat = task.hint_request(example, with_answer=with_answer)
    return _prompt(chat, task, example)


def _prompt(chat: Messages, task: Task, example: Example) -> Prompt:
    if not (isinstance(chat, list) and chat and all(map(_is_turn, chat))):
        raise KepoConfigError(
            f"task={type(task).__name__!r} asks {reprlib.repr(chat)} of example {example.id!r}; "
            'expected a list of turns, {"role": ..., "content": text} each, the question last'
        )
    *earlier, last = chat
    turns = tuple((turn["role"], turn["content"]) for turn in earlier)
    return Prompt(last["content"], example.images, turns)


def _is_turn(turn: Any) -> bool:
    """Return whether it is a turn of text, by somebody."""
    return isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )
