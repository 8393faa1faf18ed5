"""Seconds and peak memory of a call, and a stamp that says where they were measured."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Measurement:
    """What is known of one call: the first, watched for memory, and the timed ones after it."""

    first: float
    """Seconds of the first call, which also warms up."""
    peak_mib: float
    """Most memory held at any moment of it, above what was held before, gradients included."""
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median of the timed calls; the first call's where there are none."""
        return statistics.median(self.times) if self.times else self.first


def warm_up(call: Callable[[], object], device: torch.device) -> Measurement:
    peak, seconds = _watched(call, device)
    return Measurement(seconds, peak / 2**20)


def time_each(
    calls: dict[tuple[str, str], Callable[[], object]],
    measured: dict[tuple[str, str], Measurement],
    device: torch.device,
) -> None:
    """One round: every call once."""
    for key, call in calls.items():
        measured[key].times.append(_timed(call, device))


def ratio_of(a: Measurement, over: list[Measurement | None]) -> float:
    """Median over the rounds of a's time over the sum of the others'; NaN if one is missing.

    A call that was timed in no round has one ratio, that of its time to their medians.
    """
    if any(other is None for other in over):
        return float("nan")
    if not a.times:
        return a.seconds / sum(other.seconds for other in over)
    rounds = zip(a.times, *(other.times for other in over), strict=True)
    return statistics.median(mine / sum(others) for mine, *others in rounds)


def stamp() -> dict[str, str | int]:
    """Machine, versions and commit, for every row of results."""
    return {
        "machine": _cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "liger_kernel": _version("liger-kernel"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def _watched(call: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """(peak bytes, seconds). On CPU the resident set is sampled every 2 ms by a thread."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = _timed(call, device)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    done, peak = threading.Event(), [0]
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
    before = _resident()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    seconds = _timed(call, device)
    peak[0] = max(peak[0], _resident())
    done.set()
    watcher.join()
    return max(0, peak[0] - before), seconds


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        here = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
