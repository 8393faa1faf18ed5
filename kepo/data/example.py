"""Example: one question, with options or without, about any number of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The letters of the options, in order; no question can have more options."""
UNKNOWN = "unknown"
"""The modality or question type if the dataset does not give it."""


@dataclass(frozen=True)
class Example:
    """One question and its right answer. A task (`kepo.tasks.task`) makes prompts of it."""

    id: str
    """The question_id in the file, unique in the dataset."""
    question: str
    answer: str
    """The right answer: the letter of an option if there are options, else a text or a number."""
    options: tuple[str, ...] = ()
    """The texts of options A, B, C and so on, two to 26 of them; () = the answer is open."""
    images: tuple[Path, ...] = ()
    """Absolute paths with links followed. When they were read, the files existed under the dataset
    root, or under a folder linked into it."""
    modality: str = UNKNOWN
    question_type: str = UNKNOWN
    rationale: str = ""
    """The worked solution if the file has one ("3 + 5 = 8"); "" for plain OmniMedVQA."""
    earlier: tuple[tuple[str, str], ...] = ()
    """The turns before the question, (role, text) each: a system turn first, if there is one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the record, by its name in the file; rewards are given them."""

    def fields(self) -> dict[str, Any]:
        """Return all that is known of the question by name, its other columns among it."""
        own = {name: value for name, value in vars(self).items() if name != "columns"}
        return {**self.columns, **own}
