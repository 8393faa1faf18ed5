"""Example: one multiple-choice question about one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCD"
UNKNOWN = "unknown"
"""Modality or question type where the dataset does not say."""


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
    """Absolute path, links followed; existed under the dataset root when it was read."""
    modality: str
    question_type: str
    rationale: str = ""
    """Worked solution where the file has one ("3 + 5 = 8"); "" for plain OmniMedVQA."""
