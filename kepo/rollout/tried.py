"""Try a task on examples without a model, by all that a run may ask of it: the chats of a question
with a hint and without, the request for a hint, the worked answer, and the verdict on it."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from tqdm import tqdm

from kepo.data.example import Example
from kepo.rollout.encodable import Faults, faults_of, problem
from kepo.rollout.prompts import hint_prompt, prompt_of, worked_answer
from kepo.tasks.task import Task, errors_of

HINT = "Look again."


def faults_of_task(examples: Sequence[Example], task: Task, *, progress: bool = False) -> Faults:
    """Return the faults of the examples that are unfit for the task, or whose own worked answer it
    calls wrong. Raises KepoConfigError, which names the task and the example, if its code fails.

    progress: show a bar.
    """
    faults = faults_of(examples, task, [])
    fit = [example for example in examples if example.id not in faults]
    for example in tqdm(fit, desc="task", unit=" records", disable=not progress, delay=1):
        if (why := _why_wrong(task, example)) is not None:
            faults[example.id] = problem(example, "task", why)
    return faults


def _why_wrong(task: Task, example: Example) -> str | None:
    prompt_of(task, example)
    prompt_of(task, example, HINT, gives_answer=True)
    for with_answer in (False, True):
        hint_prompt(task, example, with_answer=with_answer)
    text = worked_answer(task, example)
    with errors_of(task, example):
        task.hint_of(f"<hint>{HINT}</hint>")
        task.gives_away(HINT, example)
        float(task.chance(example))
        task.is_formatted(text)
        task.answer_of(text)
        if task.is_right(text, example):
            return None
    return (
        f"the task calls its own worked answer {reprlib.repr(text)} wrong; let worked_answer give "
        "one that is_right takes"
    )
