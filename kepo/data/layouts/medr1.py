"""Med-R1's split files: JSON lists of ``image, problem, solution`` about OmniMedVQA's images.

A list ``images`` in place of ``image`` asks about several of them.

    {"image": "Images/a/b.png", "problem": "What is it? A)CT, B)X-ray", "solution": "<answer> A </answer>"}

Modality or question type is the file's name, so all that one load reads must be of one grouping.
"""  # noqa: E501

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
    require_untold,
    require_visible,
    right_letter,
    shown,
    text,
)
from kepo.disk.files import data_files
from kepo.errors import KepoDataError

_SUFFIX = re.compile(r"_(train|test)(_[0-9]+)?$")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BULLET = r"(?:^[ \t]*(?:[-*+\u2022\u2013]\s+)?)"
_MARKERS = (
    re.compile(_BULLET + r"([A-Z])[.:)]\s+", re.MULTILINE),  # one option a line
    re.compile(_BULLET[:-1] + r"|(?<=[\s,;?.:]))([A-Z])\)\s*", re.MULTILINE),  # A)one, B)other
)
_NEXT = (
    r"(?:[,;/|\t\n]|\.\s)\W*{letter}(?:[.:)\]}}>]|\s*[-\u2013\u2014])(?![a-z]\.)",  # not "e.g."
    r"[,;/|\t\n]\W*{letter}[*_\"']*\s+\S",  # ", E five"
    r"\s{letter}(?:[.:]|\s+[-\u2013\u2014])(?![a-z]\.)\s*\S",  # "by E. coli": who could tell?
    r"(?<!\w)[(\[{{<]{letter}[)\]}}>]",
    r"(?:[,;/|]\s+|\n\s*)[(\[](?:{number})[)\]]\s*\S",
)
_NEXT_BRACKET = (
    r"(?<![\w(]){letter}\)",
    r"(?<=[a-z]){capital}\)",
    r"(?:[,;/|]\s+|\n\s*)(?:{number})[.:)\]](?!\d)",
)
"""Patterns of one more option inside the text that was read as the last one: in another style than
the others, with a small letter, or with a number for its letter. The patterns of the second list
may close a bracket instead."""
_LIKE_LATIN = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",
    "ABEKMHOPCTXIJSABEZHIKMNOPTYX",
)
"""Cyrillic and Greek capital letters that look like letters of A to Z."""
_ROMAN = ("iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
"""Roman numbers from 3 on: after a list of two options, 3 is the first that can follow."""
_AFTERWORD = re.compile(
    r"[.!?;:,(>]\s*(?:please\s+)?"
    r"(?:answer|choose|select|pick\s+(?:the|one|an?)|reply|respond|note|explain|justify|give\s+(?:your|the))\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\w{3}[)\"']?[.!?]\s+[A-Z]")
"""The end of a sentence, after which text may follow the options that is none of them, such as
instructions or another sentence."""


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)`` from one file, or from every file below a folder in sorted order.

    Hidden files are passed over.
    """
    files = data_files(path, ".json") if path.is_dir() else [path]
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
    require_untold(question, options)
    require_visible("question", question, "field")
    for letter, option in zip(LETTERS, options, strict=False):
        require_visible(f"option {letter}", option, "options")
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
    """Split "question A)one, B)other" into ``(question, options)``; also lines "A: one", "A. one".

    The letters must be A, B and so on, each once. If there are more, those whose bracket closes an
    open one, as in "(vitamin A)", do not belong to the list. Raises BadRecord if that leaves no
    list or two, or if its last option may hold another option, or text that is no option at all.
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
        if (
            (read := whole or outside)
            and not _holds_another(read[1][-1], len(read[1]), _after_words(problem, chain))
            and not _goes_on(read[1])
        ):
            return read
    raise BadRecord(
        "options",
        f"problem={shown(problem)} has no list of options that can be told apart; expected a "
        "question, then A)one, B)other and so on, and nothing after the last",
    )


def _split(problem: str, chain: list[re.Match]) -> tuple[str, tuple[str, ...]] | None:
    """Return question and options if the markers A), B) and so on make a list, else None."""
    if len(chain) < 2 or "".join(m[1] for m in chain) != LETTERS[: len(chain)]:
        return None
    ends = [m.start() for m in chain[1:]] + [len(problem)]
    options = [problem[m.end() : end].strip() for m, end in zip(chain, ends, strict=True)]
    # The comma before the next letter belongs to the list, one at the end does not.
    options = [option.rstrip(",;/| ") for option in options[:-1]] + options[-1:]
    question = problem[: chain[0].start()].strip()
    return (question, tuple(options)) if question and all(options) else None


def _after_a_word(problem: str, marker: re.Match) -> bool:
    """Return whether only spaces stand between a marker and the words before it."""
    before = problem[: marker.start()]
    return before.rstrip(" ")[-1:] not in ("", *",;/|\t\n")


def _after_words(problem: str, chain: list[re.Match]) -> bool:
    """Return whether a list has markers that directly follow words, after its first marker."""
    return any(_after_a_word(problem, marker) for marker in chain[1:])


def _holds_another(option: str, number: int, after_words: bool) -> bool:
    """Return whether the last of ``number`` options seems to hold another, with the next letter.

    after_words: the list's markers directly follow words, so a marker in brackets may be another.
    """
    if number == len(LETTERS):
        return False
    option = _in_plain_letters(option)
    capital = LETTERS[number]
    styles = dict(
        letter=f"[{capital}{capital.lower()}]",
        capital=capital,
        number="|".join((str(number + 1), *_ROMAN[number - 2 : number - 1])),
    )
    if any(re.search(pattern.format(**styles), option) for pattern in _NEXT):
        return True
    closing = set() if after_words else _closing(option)
    return any(
        match.end() - 1 not in closing or option[match.end() :][:1].isalnum()
        for pattern in _NEXT_BRACKET
        for match in re.finditer(pattern.format(**styles), option)
    )


def _in_plain_letters(words: str) -> str:
    """Return the words in plain letters.

    Full-width commas, brackets and letters become ordinary ones, letters of other scripts that look
    like A to Z become A to Z, and invisible characters are dropped.
    """
    seen = (c for c in unicodedata.normalize("NFKC", words) if unicodedata.category(c) != "Cf")
    return "".join(seen).translate(_LIKE_LATIN)


def _goes_on(options: tuple[str, ...]) -> bool:
    """Return whether an option goes on with a line or sentence that is not part of the option.

    A sentence after a sentence is suspicious if only the last option has one.
    """
    if any(len(option.splitlines()) > 1 or _AFTERWORD.search(option) for option in options):
        return True
    *others, last = (bool(_SENTENCE_END.search(option)) for option in options)
    return last and not any(others)


def _closing(words: str) -> set[int]:
    """Return the places of the closing brackets that have an opening bracket before them."""
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
    """Return the sources in ``image`` or the list ``images``; ``images`` may be a function."""
    images = record.get("images")
    if callable(images):
        return partial(_some, images)
    if images is None:
        return (text(record, "image"),)
    if record.get("image") is not None:
        raise BadRecord("field", "has both image and images; expected one of them")
    if not isinstance(images, list) or not images:
        raise BadRecord("field", f"images={shown(images)}; expected a list of paths")
    for path in images:
        text({"images": path}, "images")
    return tuple(images)


def _some(images: Callable[[], Sequence[str | bytes]]) -> Sequence[str | bytes]:
    found = images()
    if not found:
        raise BadRecord("image missing", "has no images")
    return found


def _optional(record: dict[str, Any], *keys: str) -> str:
    return next((one_line(record, key) for key in keys if key in record), UNKNOWN)


def _group(file: Path) -> tuple[str, str]:
    grouping = "question_type" if "question_type" in file.parts else "modality"
    suffix = _SUFFIX.search(file.stem)
    return grouping, suffix[1] if suffix else ""
