"""What a section of the suite is given, and how it says that it cannot run here.

Nothing is imported from torch before it is needed: the process that supervises stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.losses.measure import Quantiles


class Skipped(Exception):
    """A section that cannot run here; the message says why."""


@dataclass(frozen=True)
class Clock:
    """Where to work, and how many seconds are left for it."""

    kind: str  # "cuda" or "cpu"
    left: Callable[[], float]

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.kind)

    def time(self, call: Callable[[], object], rep: int = 300) -> Quantiles:
        """Seconds of a warm call, from calls of `rep` milliseconds in all; three on a CPU."""
        from benchmarks.losses.measure import Quantiles, timed

        if not self.cuda:
            return Quantiles.of([timed(call, self.device) for _ in range(3)])
        from triton.testing import do_bench

        found = do_bench(call, warmup=50, rep=rep, quantiles=[0.5, 0.2, 0.8])
        return Quantiles(*(milliseconds / 1e3 for milliseconds in found))
