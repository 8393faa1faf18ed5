"""Task: what a model is asked about an example, and what is a right answer.

A task of your own is a class in a file, named in a recipe as ``task: file.py:MyTask``. It inherits
from `Task`, whose answers are texts that must be equal, and changes what differs:

    class Capital(kepo.Task):
        def is_right(self, text, example):
            return self.answer_of(text) == example.answer.upper()
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from kepo.data.characters import composed, shows_something, unmarked
from kepo.data.example import LETTERS, Example
from kepo.data.records import BadRecord, plain
from kepo.data.solutions import final_answer
from kepo.errors import KepoConfigError, KepoDataError, KepoError, first_line, line_of
from kepo.tasks.blocks import hint_in, said_answer, split_blocks

Messages = list[dict[str, str]]
"""A chat: ``{"role": ..., "content": ...}`` for each turn, the question last. Images are shown
before the last turn's text; they are the example's."""

TELLING = ("answer", "solution", "messages", "prompt")
"""The columns that hold the right answer, or a chat with the reply in it."""
_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


class Task:
    """A task whose answers are texts."""

    instruction = "Reply as <think>reasoning</think><answer>answer</answer>."
    """The last line of a question."""
    hint_instruction = "Give a short hint as <hint>hint</hint>."
    """The last line of a request for a hint."""

    def __init__(self, *, system_prompt: str = "", prompt_template: str = "") -> None:
        """Make a task with these settings.

        system_prompt: the system turn of examples that bring none; "" = none.
        prompt_template: the question's turn, with ``{question}``, ``{instruction}`` and the names
            of an example's columns in braces, and ``{{`` and ``}}`` for braces; "" = the question
            and the instruction, a line each. Raises KepoConfigError if it lacks ``{question}``, or
            shows a column of TELLING.
        """
        if prompt_template and "{question}" not in prompt_template:
            raise KepoConfigError(
                f"prompt_template={prompt_template!r} has no {{question}} in it; write where the "
                "question stands"
            )
        if told := [name for name in columns_in(prompt_template) if name in TELLING]:
            raise KepoConfigError(
                f"prompt_template={prompt_template!r} would show the right answer to the student: "
                f"{{{told[0]}}} holds it; leave that out"
            )
        self.system_prompt, self.prompt_template = system_prompt, prompt_template

    # ---- what is asked ----

    def check(self, example: Example) -> str | None:
        """Return what makes an example unfit for this task, as the end of a sentence that begins
        with the example's id; None if it is fit."""
        try:
            self.messages(example)
        except KepoDataError as error:
            return f"does not fit {error}"
        return None if shows_something(self.right_answer(example)) else "has no answer"

    def question(self, example: Example) -> str:
        """Return the question's text."""
        return example.question

    def messages(self, example: Example) -> Messages:
        """Return the chat that asks the question."""
        question = self.question(example)
        if not self.prompt_template:
            return self._chat(example, f"{question}\n{self.instruction}")
        known = {**example.columns, "question": question, "instruction": self.instruction}

        def filled(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            if match[1] not in known:
                raise KepoDataError(
                    f"prompt_template: {{{match[1]}}} is no column of question {example.id!r}; it "
                    f"has {', '.join(known)}"
                )
            return str(known[match[1]])

        return self._chat(example, _PLACE.sub(filled, self.prompt_template))

    def with_hint(self, messages: Messages, hint: str) -> Messages:
        """Return the chat with a hint as the last line of its last turn."""
        *earlier, last = messages
        return [*earlier, last | {"content": f"{last['content']}\nHint: {hint}"}]

    def hint_request(self, example: Example, *, with_answer: bool) -> Messages:
        """Return the chat that asks the teacher for a hint; ``with_answer`` tells it the answer."""
        told = f"{self.answer_sentence(example)} " if with_answer else ""
        return self._chat(example, f"{self.question(example)}\n{told}{self.hint_instruction}")

    def answer_sentence(self, example: Example) -> str:
        """Return the sentence that tells the right answer."""
        return f"The answer is {self.right_answer(example)}."

    def worked_answer(self, example: Example) -> str:
        """Return ``<think>3 + 5 = 8</think><answer>8</answer>``; only the answer if there is no
        rationale."""
        thought = f"<think>{example.rationale}</think>" if example.rationale else ""
        return f"{thought}<answer>{self.right_answer(example)}</answer>"

    # ---- how it is judged ----

    def right_answer(self, example: Example) -> str:
        """Return the right answer as a completion would give it."""
        return example.answer

    def answer_of(self, text: str) -> str | None:
        """Return the answer that a completion gives; None if it gives none that can be read."""
        said = said_answer(text)
        return said if said and shows_something(said) else None

    def is_right(self, text: str, example: Example) -> bool:
        """Return whether a completion gives the right answer."""
        said = self.answer_of(text)
        return said is not None and self.same(said, self.right_answer(example))

    def same(self, said: str, right: str) -> bool:
        """Return whether two answers are the same."""
        return composed(said) == composed(right)

    def is_formatted(self, text: str) -> bool:
        """Return whether a completion is ``<think>...</think><answer>...</answer>`` with nothing
        around it, something to read in the first block, and an answer in the second."""
        parts = split_blocks(text)
        if parts is None or self.answer_of(text) is None:
            return False
        before, reasoning, _ = parts
        return before == "" and reasoning is not None and shows_something(reasoning)

    def chance(self, example: Example) -> float:
        """Return the probability that blind guessing is right."""
        return 0.0

    # ---- hints ----

    def hint_of(self, text: str) -> str | None:
        """Return the hint in what the teacher wrote; None if there is none to use."""
        return hint_in(text)

    def gives_away(self, hint: str, example: Example) -> bool:
        """Return whether a hint tells the answer, and is of no use as a hint."""
        return composed(self.right_answer(example)).casefold() in composed(hint).casefold()

    def _chat(self, example: Example, text: str) -> Messages:
        turns = list(example.earlier)
        if self.system_prompt and not any(role == "system" for role, _ in turns):
            turns.insert(0, ("system", self.system_prompt))
        said: list[tuple[str, Any]] = [*turns, ("user", text)]
        return [{"role": role, "content": content} for role, content in said]


def columns_in(template: str) -> list[str]:
    """Return the names in braces in a template: columns, question and instruction."""
    return [match[1] for match in _PLACE.finditer(template) if match[1] is not None]


def refuse_told(task: Task, examples: Sequence[Example]) -> None:
    """Raise KepoConfigError if the task's template shows a column that is the right answer of every
    example, or marks it as a solution does, whatever the column's name."""
    for name in columns_in(getattr(task, "prompt_template", "")):
        if examples and all(name in e.columns and _tells(task, e, name) for e in examples):
            raise KepoConfigError(
                f"prompt_template={task.prompt_template!r} would show the right answer to the "
                f"student: {{{name}}} is the answer of all {len(examples)} questions; leave it out"
            )


def _tells(task: Task, example: Example, name: str) -> bool:
    try:
        said, _ = final_answer(str(example.columns[name]))
    except BadRecord:  # several answers
        return False
    with errors_of(task, example):
        right = [task.right_answer(example), example.answer]
    if example.options and example.answer in LETTERS[: len(example.options)]:
        right.append(example.options[LETTERS.index(example.answer)])
    return plain(unmarked(said)) in {plain(unmarked(words)) for words in right}


@contextlib.contextmanager
def errors_of(task: Task, example: Example) -> Iterator[None]:
    """Turn what the code of a task raises into an error that names the task and the example."""
    try:
        yield
    except KepoError:
        raise
    except Exception as error:
        raise KepoConfigError(
            f"task={type(task).__name__!r} raised {type(error).__name__} on example "
            f"{example.id!r}: {first_line(error)} ({line_of(error)})"
        ) from error
