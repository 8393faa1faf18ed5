"""The sums of a step, from which its metrics are made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kepo.distributed.processes import all_gather


@dataclass
class StepTotals:
    """Sums over the micro-batches and iterations of a step."""

    policy_loss: float = 0.0
    distill_loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    divergence: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    tokens: int = 0
    teacher_tokens: int = 0
    """Tokens that the teacher was asked about, each once."""
    distilled_tokens: int = 0
    """Tokens with a weight in the divergence, in each iteration anew."""
    teacher_seconds: float = 0.0
    teacher_requests: int = 0
    """Requests to servers of teachers, those for hints and those made again among them."""
    teacher_retries: int = 0
    sampler_gap: float = 0.0
    sampler_gap_max: float = 0.0
    sampled_tokens: int = 0
    ratio: float = 0.0
    ratio_max: float = 0.0
    ratio_tokens: int = 0
    odd_micros: int = 0
    """Micro-batches in which a model's states were not finite."""

    unread: dict[str, Tensor] = field(default_factory=dict)
    """What is still to be added to these numbers: sums and maxima on the device, which are read
    when the step is over, in one copy."""

    def add(self, name: str, values: Tensor) -> None:
        """Add the sum of a tensor's values, without waiting for it."""
        total = values.detach().sum(dtype=torch.float64)
        self.unread[name] = self.unread[name] + total if name in self.unread else total

    def reach(self, name: str, values: Tensor) -> None:
        """Raise a maximum to a tensor's largest value, without waiting for it."""
        top = values.detach().max().double()
        self.unread[name] = torch.maximum(self.unread[name], top) if name in self.unread else top

    def of_all_ranks(self) -> StepTotals:
        """Return the totals of all ranks as one: sums, and the larger of a maximum or a time."""
        values = torch.stack(list(self.unread.values())).tolist() if self.unread else []
        read = dict(zip(self.unread, values, strict=True))
        names = [field.name for field in fields(self) if field.name != "unread"]
        mine = {name: _combined(name, [getattr(self, name), read.get(name, 0.0)]) for name in names}
        everyones = all_gather(mine)
        return StepTotals(**{name: _combined(name, [t[name] for t in everyones]) for name in names})


_LARGEST = ("sampler_gap_max", "ratio_max", "teacher_seconds")


def _combined(name: str, values: list[float]) -> Any:
    return max(values) if name in _LARGEST else sum(values)
