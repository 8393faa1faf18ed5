"""The settings of the comparison: the start and the teacher that every method is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kepo.digits.dataset import SMALL_DIGITS
from kepo.digits.demo import DIGITS_RUN
from kepo.miniature.warm_up import HintStyle

COMMON: Mapping[str, Any] = DIGITS_RUN | dict(
    num_hinted=2, max_attempts=3, sampling_temperature=1.0, top_p=1.0
)
"""What all runs share, unless a method is about it: it overrides the presets."""


@dataclass(frozen=True)
class Setting:
    """The start that every method has, and the teacher; equal for all methods."""

    about: str
    """One sentence, for the page."""
    warmup_steps: int = 300
    """Supervised steps of the student, on the first rendering."""
    warmup_question_types: tuple[str, ...] | None = (SMALL_DIGITS,)
    """Types of the questions in these steps; None = all. The hints in them are about all types."""
    warmup_hint_fraction: float = 0.5
    """Share of the warm-up's answers that are about hints."""
    teacher_steps: int = 350
    """Supervised steps of the teacher, on all renderings; there is one for all seeds."""
    teacher_hint_fraction: float = 0.4
    """Share of the teacher's answers that are about hints."""
    hint_style: HintStyle = "sum"
    """What a hint says, of teacher and warm-up."""


_CLIFF = Setting(
    about="The student's warm-up never showed the digits 6 to 9, so that it fails every sample of "
    "about a third of its questions; but it can add what a hint tells it.",
)

SETTINGS = {
    "cliff": _CLIFF,
    "weak_75": replace(
        _CLIFF,
        about="As `cliff`, with a teacher that is right on about three questions of four.",
        teacher_steps=250,
    ),
    "weak_50": replace(
        _CLIFF,
        about="As `cliff`, with a teacher that is right on about half of the questions.",
        teacher_steps=200,
    ),
    "one_digit": replace(
        _CLIFF,
        about="As `cliff`, but a hint names one digit only, the larger: it helps, and does not "
        "determine the answer.",
        hint_style="one_digit",
    ),
    "mild": replace(
        _CLIFF,
        about="The student has seen all digits in a shorter warm-up, and is right on some sample "
        "of most questions.",
        warmup_steps=240,
        warmup_question_types=None,
        warmup_hint_fraction=0.4,
    ),
}
