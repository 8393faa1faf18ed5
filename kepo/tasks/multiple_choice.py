"""All texts that are put to the models, built without templates, so braces in them are safe."""

from __future__ import annotations

import re

from kepo.data.characters import shows_something
from kepo.data.load import LETTERS, Example
from kepo.tasks.leaks import states_answer as states_answer  # importable from here, too

ANSWER_INSTRUCTION = "Reply as <think>reasoning</think><answer>letter</answer>."
HINT_INSTRUCTION = "Give a short hint as <hint>hint</hint>."

_HINT = re.compile(r"<hint>(.*?)</hint>", re.DOTALL)


def question_prompt(example: Example) -> str:
    """Return the prompt: the question, its options one per line, and the answer format."""
    return f"{_question(example)}\n{ANSWER_INSTRUCTION}"


def hint_request(example: Example, with_answer: bool) -> str:
    """Return the request to the teacher for a hint; ``with_answer`` tells it the right letter."""
    told = f"The answer is {example.answer}. " if with_answer else ""
    return f"{_question(example)}\n{told}{HINT_INSTRUCTION}"


def hinted_prompt(example: Example, hint: str, gives_answer: bool = False) -> str:
    """Return ``question_prompt`` with a hint as its last line; ``gives_answer`` adds the right
    letter."""
    told = f"\nThe answer is {example.answer}." if gives_answer else ""
    return f"{question_prompt(example)}\nHint: {hint}{told}"


def parse_hint(text: str) -> str | None:
    """Return the inside of the one ``<hint>...</hint>`` in ``text``, stripped; it may span lines.

    None if there is no such pair, more than one, an unmatched tag, or nothing to be seen inside.
    """
    if text.count("<hint>") != 1 or text.count("</hint>") != 1:
        return None
    match = _HINT.search(text)
    return match[1].strip() if match and shows_something(match[1]) else None


def worked_answer(example: Example) -> str:
    """Return ``<think>3 + 5 = 8</think><answer>C</answer>``; only the answer if there is no
    rationale."""
    thought = f"<think>{example.rationale}</think>" if example.rationale else ""
    return f"{thought}<answer>{example.answer}</answer>"


def _question(example: Example) -> str:
    lines = [example.question]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, example.options, strict=False)]
    return "\n".join(lines)
