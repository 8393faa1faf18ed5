"""Example: one multiple-choice question about one or several images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Names of the options, in order; no question can have more of them."""
UNKNOWN = "unknown"
"""Modality or question type where the dataset does not say."""


@dataclass(frozen=True)
class Example:
    """One question about one image, or about several in an order."""

    id: str
    """question_id of the file, unique in the dataset."""
    question: str
    options: tuple[str, ...]
    """Texts of options A, B, C and so on; two to 26 of them."""
    answer: str
    """The right letter."""
    images: tuple[Path, ...]
    """Absolute paths, links followed; existed under the dataset root, or under a folder linked into
    it, when they were read."""
    modality: str
    question_type: str
    rationale: str = ""
    """Worked solution where the file has one ("3 + 5 = 8"); "" for plain OmniMedVQA."""
