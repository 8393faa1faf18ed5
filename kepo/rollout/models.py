"""The models of a run, by what each of them does in it."""

from __future__ import annotations

from dataclasses import dataclass

from kepo.models.vlm import VLM
from kepo.rollout.sampler import Sampler
from kepo.teachers.several import Teachers


@dataclass(frozen=True)
class Models:
    """The policy that is trained, its teacher, the reference it is kept close to, the sampler."""

    policy: VLM
    """The student; only it is trained."""
    teacher: Teachers
    """The model that writes hints and is distilled from, or several; None where neither is asked
    for."""
    ref: VLM | None
    """The start point that the k3 penalty keeps the policy close to; None without a penalty."""
    sampler: Sampler
    """The sampler that draws completions with the policy's weights."""
