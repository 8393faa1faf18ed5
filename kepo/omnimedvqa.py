"""OmniMedVQA as it is published: ``QA_information/**/*.json`` beside ``Images/``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.errors import KepoDataError
from kepo.example import LETTERS, Example
from kepo.records import BadRecord, Parsed, fields_of, plain, read_list, right_letter, text

FOLDER = "QA_information"
EXPECTED = f"{FOLDER}/**/*.json next to the images, as OmniMedVQA is published"


def rows(root: Path) -> Iterator[tuple[str, Any]]:
    """Files in sorted order, records in file order."""
    folder = root / FOLDER
    if not folder.is_dir():
        raise KepoDataError(f"omnimedvqa: {root} has no folder {FOLDER}; expected {EXPECTED}")
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise KepoDataError(f"omnimedvqa: no *.json under {folder}; expected {EXPECTED}")
    for file in files:
        yield from read_list(file)


def parse(record: Any, where: str) -> Parsed:
    """``question_id, question_type, question, gt_answer, image_path, option_A, option_B``,
    optionally ``option_C, option_D, rationale``, and ``modality_type`` or ``modality``."""
    record = fields_of(record)
    options = _options(record)
    example = Example(
        id=text(record, "question_id"),
        question=text(record, "question"),
        options=options,
        answer=right_letter(text(record, "gt_answer", "answer"), options),
        images=(),
        modality=text(record, "modality_type" if "modality_type" in record else "modality"),
        question_type=text(record, "question_type"),
        rationale=text(record, "rationale") if "rationale" in record else "",
    )
    return example, (text(record, "image_path"),)


def quirks(record: dict[str, Any], example: Example) -> list[str]:
    """In what a good record departs from the published schema."""
    found = []
    if "modality_type" not in record:
        found.append("modality in place of modality_type")
    for letter in LETTERS[len(example.options) :]:
        found.append(f"no option_{letter}")
    answer = record["gt_answer"]
    if answer != (option := example.options[LETTERS.index(example.answer)]):
        assert plain(answer) == plain(option)
        found.append("answer spelt otherwise than its option")
    return found


def _options(record: dict[str, Any]) -> tuple[str, ...]:
    present = [letter for letter in LETTERS if record.get(f"option_{letter}") is not None]
    if len(present) < 2 or "".join(present) != LETTERS[: len(present)]:
        raise BadRecord(
            "options",
            f"has options {present}; expected option_A, option_B and optionally option_C, "
            "option_D, without gaps",
        )
    return tuple(text(record, f"option_{letter}", "options") for letter in present)
