"""Example: one multiple-choice question about one or several images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The letters of the options, in order; no question can have more options."""
UNKNOWN = "unknown"
"""The modality or question type if the dataset does not give it."""


@dataclass(frozen=True)
class Example:
    """One question about one image, or about several in an order."""

    id: str
    """The question_id in the file, unique in the dataset."""
    question: str
    options: tuple[str, ...]
    """The texts of options A, B, C and so on; there are two to 26."""
    answer: str
    """The letter of the right option."""
    images: tuple[Path, ...]
    """Absolute paths with links followed. When they were read, the files existed under the dataset
    root, or under a folder linked into it."""
    modality: str
    question_type: str
    rationale: str = ""
    """The worked solution if the file has one ("3 + 5 = 8"); "" for plain OmniMedVQA."""
