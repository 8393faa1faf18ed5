"""Med-R1's split files: JSON lists of ``image, problem, solution`` about OmniMedVQA's images.

A list ``images`` in place of ``image`` asks about several of them.

    {"image": "Images/a/b.png", "problem": "What is it? A)CT, B)X-ray", "solution": "<answer> A </answer>"}

Modality or question type is the file's name, so all that one load reads must be of one grouping.
"""  # noqa: E501

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.data.example import LETTERS, UNKNOWN, Example
from kepo.data.records import (
    BadRecord,
    Parsed,
    Sources,
    fields_of,
    one_line,
    read_list,
    right_letter,
    shown,
    text,
)
from kepo.disk.files import json_files
from kepo.errors import KepoDataError

_SUFFIX = re.compile(r"_(train|test)(_[0-9]+)?$")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKERS = (
    re.compile(r"^[ \t]*([A-Z])[.:)]\s+", re.MULTILINE),  # one option a line
    re.compile(r"(?:^|(?<=[\s,;?.:]))([A-Z])\)\s*"),  # A)one, B)other
)
_NEXT = (
    r"[,;/|\t\n]\s*\(?{either}[.:)](?![a-z]\.)",  # after a separator; not "e.g."
    r"\s{either}[.:](?![a-z]\.)\s*\S",  # "infection by E. coli" is one, too: who could tell?
    r"(?<!\w)\({either}\)",
)
_NEXT_BRACKET = r"(?<![\w(]){either}\)"
"""How one more option may stand in what was read as the last: in another style than the others, or
with a small letter."""


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """One file, or every file below a folder in sorted order; hidden ones are passed over."""
    files = json_files(path) if path.is_dir() else [path]
    groups = {_group(file) for file in files}
    if len(groups) > 1:
        raise KepoDataError(
            f"{path} holds the groups {sorted('/'.join(g) for g in groups)}, which repeat "
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
        id=one_line(record, "question_id"),
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

    The letters must be A, B and so on, each once. If there are others, those whose bracket
    closes one, as in "(vitamin A)", are not of the list. Raises BadRecord where that leaves no
    list or two, or where its last option may hold one more.
    """
    closing = _closing(problem)
    for marker in _MARKERS:
        found = list(marker.finditer(problem))
        within = [m for m in found if m.end(1) in closing]
        rest = [m for m in found if m not in within]
        whole, outside = _split(problem, found), _split(problem, rest) if within else None
        if whole and outside:
            # "low (vitamin C) intake" is words; after a comma or line, some bracket never closed.
            words = [
                _after_a_word(problem, m) and not problem[m.end(1) + 1 :][:1].isalnum()
                for m in within
            ]
            if any(words) and not all(words):
                continue
            whole = None if any(words) else whole
        chain = found if whole else rest
        if (read := whole or outside) and not _holds_another(
            read[1][-1], len(read[1]), _after_words(problem, chain)
        ):
            return read
    raise BadRecord(
        "options",
        f"problem={shown(problem)} has no list of options that can be told apart; expected a "
        "question and then A)one, B)other and so on",
    )


def _split(problem: str, chain: list[re.Match]) -> tuple[str, tuple[str, ...]] | None:
    """Question and options if these markers are those of a list."""
    if len(chain) < 2 or "".join(m[1] for m in chain) != LETTERS[: len(chain)]:
        return None
    ends = [m.start() for m in chain[1:]] + [len(problem)]
    options = [problem[m.end() : end].strip() for m, end in zip(chain, ends, strict=True)]
    # The comma before the next letter belongs to the list, one at the end does not.
    options = [option.rstrip(",;/| ") for option in options[:-1]] + options[-1:]
    question = problem[: chain[0].start()].strip()
    return (question, tuple(options)) if question and all(options) else None


def _after_a_word(problem: str, marker: re.Match) -> bool:
    """Whether nothing but spaces parts a marker from the words before it."""
    before = problem[: marker.start(1)]
    return before.rstrip(" ")[-1:] not in ("", *",;/|\t\n")


def _after_words(problem: str, chain: list[re.Match]) -> bool:
    """Whether a list has such markers after its first."""
    return any(_after_a_word(problem, marker) for marker in chain[1:])


def _holds_another(option: str, number: int, after_words: bool) -> bool:
    """Whether the last of so many options seems to go on with the next letter.

    after_words: the markers of the list stand after words, so that one in brackets may be another.
    """
    if number == len(LETTERS):
        return False
    option = unicodedata.normalize("NFKC", option)  # so that wide commas and brackets are plain
    either = f"[{LETTERS[number]}{LETTERS[number].lower()}]"
    if any(re.search(pattern.format(either=either), option) for pattern in _NEXT):
        return True
    closing = set() if after_words else _closing(option)
    brackets = re.finditer(_NEXT_BRACKET.format(either=either), option)
    return any(
        match.end() - 1 not in closing or option[match.end() :][:1].isalnum() for match in brackets
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
        raise BadRecord(
            "answer", f"solution={shown(solution)} has {len(tagged)} answers; expected one"
        )
    return right_letter(tagged[0] if tagged else solution, options)


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
        raise BadRecord("field", f"images={shown(images)}; expected a list of paths")
    for path in images:
        text({"images": path}, "images")
    return tuple(images)


def _optional(record: dict[str, Any], *keys: str) -> str:
    return next((one_line(record, key) for key in keys if key in record), UNKNOWN)


def _group(file: Path) -> tuple[str, str]:
    grouping = "question_type" if "question_type" in file.parts else "modality"
    suffix = _SUFFIX.search(file.stem)
    return grouping, suffix[1] if suffix else ""
