"""Memory of a process: resident on a CPU, tensors on a GPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from benchmarks.losses import measure
from kepo_kernels.compute import pages


class Gauge:
    """MiB of this process: resident memory on a CPU, tensors on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def settle(self) -> float:
        """Gives back what is free and begins to count anew; returns what is held."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        else:
            pages.release()
            ctypes.CDLL(None).malloc_trim(0)
        self.most()
        return torch.cuda.memory_allocated() / 2**20 if self.cuda else resident("VmRSS")

    def most(self) -> float:
        """The most that was held since this was last asked."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return peak
        peak = resident("VmHWM")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"error: this benchmark needs Linux and its /proc: {error}") from error
        return peak

    def warm(self, above_mib: float) -> None:
        """Before a timed call: on a CPU touches as much memory as it will need."""
        if not self.cuda:
            measure._settle(above_mib)

    def reserved(self) -> float | None:
        """What torch's allocator has taken of the GPU."""
        return torch.cuda.memory_reserved() / 2**20 if self.cuda else None


def resident(what: str) -> float:
    """VmRSS, memory of this process now, or VmHWM, its highest so far, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))
