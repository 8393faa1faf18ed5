"""The layout of OmniMedVQA as it is published: ``QA_information/**/*.json`` beside ``Images/``.

Published questions have two to four options; up to 26 are read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.data.example import LETTERS, Example
from kepo.data.records import (
    BadRecord,
    Parsed,
    fields_of,
    one_line,
    read_list,
    require_untold,
    right_letter,
    shown,
    text,
)
from kepo.disk.files import data_files
from kepo.errors import KepoDataError

FOLDER = "QA_information"
EXPECTED = f"{FOLDER}/**/*.json next to the images, as OmniMedVQA is published"
PUBLISHED = "ABCD"
_OPTION = re.compile(r"\s*option[_ -]?(.|[0-9]+)\s*$(?<!options)", re.IGNORECASE)
_LIKE_OPTIONS = re.compile(
    r"""
    \s* (?!.*(?i:count|number|total))
    (?: (?i:opt|option|choice|alternative|distractor|candidate) (?i:s?) (?![a-z]{2})
      | (?i: answer s? [\W_]* (?:.|[0-9]+|list|text)? \s* $ ) )
    """,
    re.VERBOSE,
)
"""Names of fields that seem to hold options or the answer: options, opt_C, choiceC; not optical,
option_count, answer_type."""


def rows(root: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``: files in sorted order, records in file order, no hidden files."""
    folder = root / FOLDER
    if not folder.is_dir():
        raise KepoDataError(f"{root} has no folder {FOLDER}; expected {EXPECTED}")
    files = data_files(folder, ".json")
    if not files:
        raise KepoDataError(f"{folder} has no *.json in it; expected {EXPECTED}")
    for file in files:
        yield from read_list(file)


def parse(record: Any, where: str) -> Parsed:
    """Parse a record with the fields ``question_id, question_type, question, gt_answer,
    image_path, option_A, option_B``, optionally ``option_C`` and so on, ``rationale``, and
    ``modality_type`` or ``modality``."""
    record = fields_of(record)
    options = _options(record)
    question = text(record, "question")
    require_untold(question, options)
    example = Example(
        id=one_line(record, "question_id"),
        question=question,
        options=options,
        answer=right_letter(text(record, "gt_answer", "answer"), options),
        images=(),
        modality=one_line(record, "modality_type" if "modality_type" in record else "modality"),
        question_type=one_line(record, "question_type"),
        rationale=text(record, "rationale") if "rationale" in record else "",
    )
    return example, (text(record, "image_path"),)


def quirks(record: dict[str, Any], example: Example) -> list[str]:
    """Return the ways in which a good record departs from the published schema."""
    found = []
    if "modality_type" not in record:
        found.append("modality in place of modality_type")
    for letter in PUBLISHED[len(example.options) :]:
        found.append(f"no option_{letter}")
    if len(example.options) > len(PUBLISHED):
        found.append(f"more than {len(PUBLISHED)} options")
    if record["gt_answer"] != example.options[LETTERS.index(example.answer)]:
        found.append("answer spelt otherwise than its option")
    return found


def _options(record: dict[str, Any]) -> tuple[str, ...]:
    """Return all options of the record; a field that seems an option by another name is an error
    (BadRecord)."""
    present = [key for key, value in record.items() if value is not None and _OPTION.match(key)]
    expected = [f"option_{letter}" for letter in LETTERS[: len(present)]]
    if len(present) < 2 or sorted(present) != expected:
        raise BadRecord(
            "options",
            f"has options {sorted(present)}; expected option_A, option_B and optionally option_C, "
            "option_D and so on to option_Z, without gaps",
        )
    unread = sorted(
        key
        for key, value in record.items()
        if value is not None
        and not _OPTION.match(key)
        and _LIKE_OPTIONS.match(unicodedata.normalize("NFKC", key))
    )
    if unread:
        raise BadRecord(
            "options",
            f"has {shown(unread)}, which may be options or answers and are not read; expected "
            "options as option_A, option_B and so on, the answer as gt_answer, and nothing else "
            "of the kind",
        )
    return tuple(text(record, key, "options") for key in expected)
