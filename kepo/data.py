"""Multiple-choice questions about images, read from OmniMedVQA's own layout on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from kepo.errors import KepoConfigError, KepoDataError

LETTERS = "ABCD"
_LAYOUT = "QA_information/**/*.json next to the images, as OmniMedVQA is published"


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    id: str
    """question_id of the file, unique in the dataset."""
    question: str
    options: tuple[str, ...]
    """Texts of options A, B, C, D in this order; two to four of them."""
    answer: str
    """The right letter."""
    image: Path
    """Absolute path; existed under the dataset root when it was read."""
    modality: str
    question_type: str
    rationale: str = ""
    """Worked solution where the file has one ("3 + 5 = 8"); "" for plain OmniMedVQA."""


def load_omnimedvqa(
    root: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read ``root/QA_information/**/*.json``, files in sorted order, records in file order.

    Each file is a JSON list of objects with ``question_id, question_type, question, gt_answer,
    image_path, option_A ...`` and ``modality_type`` (or ``modality``). Options C and D may be
    absent. ``image_path`` is relative to ``root``. The right letter is that of the one option equal
    to ``gt_answer``, apart from case, spaces and a final period.

    modalities, question_types: keep only these; None keeps all.
    limit: the first so many of what is kept; None keeps all.

    Raises KepoDataError, which names the file and the index in it, for a missing folder, a broken
    record, a repeated id, an unknown name in a filter, an image that is missing or outside root.
    """
    if limit is not None and limit < 1:
        raise KepoConfigError(f"load_omnimedvqa: limit is {limit}; give None or a number >= 1")
    root = Path(root).resolve()
    folder = root / "QA_information"
    if not folder.is_dir():
        raise KepoDataError(
            f"load_omnimedvqa: root={root} has no folder QA_information; expected {_LAYOUT}"
        )
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise KepoDataError(f"load_omnimedvqa: no *.json under {folder}; expected {_LAYOUT}")

    records: list[tuple[str, Example]] = []
    first_seen: dict[str, str] = {}
    for file in files:
        for index, record in enumerate(_read_list(file)):
            where = f"{file}[{index}]"
            example = _parse(record, root, where)
            if example.id in first_seen:
                raise KepoDataError(
                    f"load_omnimedvqa: question_id {example.id!r} at {where} was already used at "
                    f"{first_seen[example.id]}; ids must be unique in a dataset"
                )
            first_seen[example.id] = where
            records.append((where, example))

    _check_names("modalities", modalities, {e.modality for _, e in records})
    _check_names("question_types", question_types, {e.question_type for _, e in records})
    kept = [
        (where, example)
        for where, example in records
        if (modalities is None or example.modality in modalities)
        and (question_types is None or example.question_type in question_types)
    ][:limit]
    # Only what is returned is looked up on disk: a subset may be used without all 88,996 images.
    for where, example in kept:
        _check_image(example.image, root, where)
    return [example for _, example in kept]


def load_image(example: Example) -> Image.Image:
    """The example's image as RGB; KepoDataError if it cannot be decoded."""
    return open_rgb(example.image)


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file fully, as RGB; KepoDataError names the file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise KepoDataError(
            f"open_rgb: cannot read the image {path}: {error}; expected a readable PNG or JPEG"
        ) from error


def _read_list(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KepoDataError(f"load_omnimedvqa: {file} is not readable JSON: {error}") from error
    if not isinstance(content, list):
        raise KepoDataError(
            f"load_omnimedvqa: {file} holds a {type(content).__name__}; expected a list of objects"
        )
    return content


def _parse(record: Any, root: Path, where: str) -> Example:
    if not isinstance(record, dict):
        raise KepoDataError(
            f"load_omnimedvqa: {where} is a {type(record).__name__}; expected an object"
        )
    options = _options(record, where)
    modality_key = "modality_type" if "modality_type" in record else "modality"
    return Example(
        id=_text(record, "question_id", where),
        question=_text(record, "question", where),
        options=options,
        answer=_right_letter(_text(record, "gt_answer", where), options, where),
        image=root / _text(record, "image_path", where),
        modality=_text(record, modality_key, where),
        question_type=_text(record, "question_type", where),
        rationale=_text(record, "rationale", where) if "rationale" in record else "",
    )


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise KepoDataError(
            f"load_omnimedvqa: {where} has {key}={value!r}; expected a non-empty string"
        )
    return value


def _options(record: dict[str, Any], where: str) -> tuple[str, ...]:
    present = [letter for letter in LETTERS if record.get(f"option_{letter}") is not None]
    if len(present) < 2 or "".join(present) != LETTERS[: len(present)]:
        raise KepoDataError(
            f"load_omnimedvqa: {where} has options {present}; expected option_A, option_B and "
            "optionally option_C, option_D, without gaps"
        )
    return tuple(_text(record, f"option_{letter}", where) for letter in present)


def _right_letter(gt_answer: str, options: tuple[str, ...], where: str) -> str:
    wanted = _plain(gt_answer)
    matches = [
        letter for letter, option in zip(LETTERS, options, strict=False) if _plain(option) == wanted
    ]
    if len(matches) != 1:
        raise KepoDataError(
            f"load_omnimedvqa: {where} has gt_answer={gt_answer!r}, which equals "
            f"{len(matches)} of the options {options}; expected exactly one"
        )
    return matches[0]


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(". ").casefold()


def _check_names(argument: str, wanted: Sequence[str] | None, present: set[str]) -> None:
    if wanted is None:
        return
    if isinstance(wanted, str):
        raise KepoConfigError(
            f"load_omnimedvqa: {argument}={wanted!r} is a string; give a sequence of names"
        )
    if unknown := sorted(set(wanted) - present):
        raise KepoDataError(
            f"load_omnimedvqa: {argument} names {unknown}, which the dataset lacks; "
            f"it has {sorted(present)}"
        )


def _check_image(image: Path, root: Path, where: str) -> None:
    # resolve() also follows links, so a link inside root cannot lead out of it.
    if not image.resolve().is_relative_to(root):
        raise KepoDataError(
            f"load_omnimedvqa: image_path of {where} leads to {image.resolve()}, outside {root}; "
            "image paths must stay inside the dataset root"
        )
    if not image.is_file():
        raise KepoDataError(f"load_omnimedvqa: image of {where} not found at {image}")
