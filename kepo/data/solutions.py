"""The final answer inside a worked solution, however the dataset marks it."""

from __future__ import annotations

import re

from kepo.data.records import BadRecord, shown

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LAST_LINE = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*$")
"""GSM8K's ``#### 42``, which is the last line of a solution."""
_BOXED = re.compile(r"\\boxed\s*\{")
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
"""LaTeX that only sets its contents as words, where it is all that a box holds."""
_THOUGHT = re.compile(r"</?think>")


def final_answer(solution: str) -> tuple[str, str]:
    r"""Return ``(the final answer, the reasoning before it)``.

    The answer stands in ``<answer>...</answer>``, in the last ``\boxed{...}``, or after ``####`` in
    the last line. Without such a mark the whole text is the answer, and there is no reasoning.
    Raises BadRecord for several pairs of tags, or a box that is not closed.
    """
    tagged = list(TAG.finditer(solution))
    if len(tagged) > 1:
        raise BadRecord(
            "answer", f"solution={shown(solution)} has {len(tagged)} answers; expected one"
        )
    if tagged:
        inside = tagged[0][1]
        return boxed(inside) or inside.strip(), _reasoning(solution[: tagged[0].start()])
    if box := _last_box(solution):
        start, end, found = box
        alone = not (solution[:start] + solution[end:]).strip(" $.\n")
        return found, "" if alone else _reasoning(solution)
    if match := _LAST_LINE.search(solution):
        return match[1], _reasoning(solution[: match.start()])
    return solution.strip(), ""


def boxed(words: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` holds, with braces inside it, or None if there is none.

    Raises BadRecord if that box is not closed.
    """
    box = _last_box(words)
    return box[2] if box else None


def _last_box(words: str) -> tuple[int, int, str] | None:
    """Return where the last box begins and ends, and what it holds."""
    boxes = list(_BOXED.finditer(words))
    if not boxes:
        return None
    start = boxes[-1].end()
    depth = 1
    for place in range(start, len(words)):
        if words[place - 1] == "\\":  # \{ and \} are drawn
            continue
        depth += {"{": 1, "}": -1}.get(words[place], 0)
        if depth == 0:
            inside = words[start:place].strip()
            return boxes[-1].start(), place + 1, in_words(inside)
    raise BadRecord("answer", f"solution={shown(words)} has a \\boxed{{ that is not closed")


def in_words(inside: str) -> str:
    r"""Return what a box means to say: ``CT`` of ``\text{CT}``."""
    match = _WORDS.fullmatch(inside)
    return match[1].strip() if match else inside


def _reasoning(words: str) -> str:
    return _THOUGHT.sub("", words).strip()
