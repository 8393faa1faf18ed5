"""The models of a run, by what each of them does in it."""

from __future__ import annotations

from dataclasses import dataclass

from kepo.models.vlm import VLM
from kepo.rollout.sampler import Sampler


@dataclass(frozen=True)
class Models:
    """Who is trained, who teaches, who is kept close to, and who samples."""

    policy: VLM
    """The student; it alone is trained."""
    teacher: VLM | None
    """Writes hints and is distilled from; None where neither is asked for."""
    ref: VLM | None
    """The start point that the k3 penalty keeps the policy close to; None without a penalty."""
    sampler: Sampler
    """Samples completions with the policy's weights."""
