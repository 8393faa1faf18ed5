"""Med-R1's split files: JSON lists of ``image, problem, solution`` about OmniMedVQA's images.

A list ``images`` in place of ``image`` asks about several of them.

    {"image": "Images/a/b.png", "problem": "What is it? A)CT, B)X-ray", "solution": "<answer> A </answer>"}

Modality or question type is the file's name, so all that one load reads must be of one grouping.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.errors import KepoDataError
from kepo.example import LETTERS, UNKNOWN, Example
from kepo.records import BadRecord, Parsed, Sources, fields_of, read_list, right_letter, text

_SUFFIX = re.compile(r"_(train|test)(_\d+)?$")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKERS = (
    re.compile(r"^[ \t]*([A-D])[.:)]\s+", re.MULTILINE),  # one option a line
    re.compile(r"(?:^|(?<=[\s,;?.:]))([A-D])\)\s*"),  # A)one, B)other
)


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """One file, or every file below a folder in sorted order."""
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    groups = {_group(file) for file in files}
    if len(groups) > 1:
        raise KepoDataError(
            f"medr1: {path} holds the groups {sorted('/'.join(g) for g in groups)}, which repeat "
            "each other's questions or separate training from test; give the folder of one"
        )
    for file in files:
        key = "question_type" if "question_type" in file.parts else "modality"
        name = _SUFFIX.sub("", file.stem)
        for index, (where, record) in enumerate(read_list(file)):
            if isinstance(record, dict):
                record = {"question_id": f"{file.stem}[{index}]", key: name} | record
            yield where, record


def parse(record: Any, where: str) -> Parsed:
    record = fields_of(record)
    question, options = split_problem(text(record, "problem"))
    example = Example(
        id=text(record, "question_id"),
        question=question,
        options=options,
        answer=_letter(text(record, "solution", "answer"), options),
        images=(),
        modality=_optional(record, "modality_type", "modality"),
        question_type=_optional(record, "question_type"),
    )
    return example, _sources(record)


def split_problem(problem: str) -> tuple[str, tuple[str, ...]]:
    """``(question, options)`` of "question A)one, B)other"; also with "A: one", "A. one" on lines.

    The letters must be A B, A B C or A B C D, each once. If there are others, those whose bracket
    closes one, as in "(vitamin A)", are not of the list.
    """
    for marker in _MARKERS:
        found = list(marker.finditer(problem))
        closing = _closing(problem)
        for chain in (found, [m for m in found if m.end(1) not in closing]):
            if len(chain) < 2 or "".join(m[1] for m in chain) != LETTERS[: len(chain)]:
                continue
            ends = [m.start() for m in chain[1:]] + [len(problem)]
            options = [problem[m.end() : end].strip() for m, end in zip(chain, ends, strict=True)]
            # The comma before the next letter belongs to the list, one at the end does not.
            options = [option.rstrip(",; ") for option in options[:-1]] + options[-1:]
            question = problem[: chain[0].start()].strip()
            if question and all(options):
                return question, tuple(options)
    raise BadRecord(
        "options",
        f"problem={problem!r} has no list of options that can be told apart; expected a question "
        "and then A)one, B)other up to D",
    )


def _closing(words: str) -> set[int]:
    """Places of the brackets that close one."""
    depth, places = 0, set()
    for place, character in enumerate(words):
        if character == "(":
            depth += 1
        elif character == ")" and depth:
            depth -= 1
            places.add(place)
    return places


def _letter(solution: str, options: tuple[str, ...]) -> str:
    tagged = _TAG.findall(solution)
    if len(tagged) > 1:
        raise BadRecord("answer", f"solution={solution!r} has {len(tagged)} answers; expected one")
    answer = (tagged[0] if tagged else solution).strip()
    if answer in LETTERS[: len(options)] and len(answer) == 1:
        return answer
    return right_letter(answer, options)


def _sources(record: dict[str, Any]) -> Sources:
    """What ``image`` or the list ``images`` say; in the latter's place there may be a function."""
    images = record.get("images")
    if callable(images):
        return images
    if images is None:
        return (text(record, "image"),)
    if record.get("image") is not None:
        raise BadRecord("field", "has both image and images; expected one of them")
    if not isinstance(images, list) or not images:
        raise BadRecord("field", f"images={images!r}; expected a list of paths")
    for path in images:
        if not isinstance(path, str) or not path.strip():
            raise BadRecord("field", f"images={images!r}; expected non-empty strings in it")
    return tuple(images)


def _optional(record: dict[str, Any], *keys: str) -> str:
    return next((text(record, key) for key in keys if key in record), UNKNOWN)


def _group(file: Path) -> tuple[str, str]:
    grouping = "question_type" if "question_type" in file.parts else "modality"
    suffix = _SUFFIX.search(file.stem)
    return grouping, suffix[1] if suffix else ""
