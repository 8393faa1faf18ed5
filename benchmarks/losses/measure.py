"""Seconds and peak memory of a call, and a stamp that says where they were measured."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Quantiles(NamedTuple):
    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        """Of the values as they are, interpolated between neighbours; NaN if there are none."""
        if not values:
            return cls(*[float("nan")] * 3)
        ranked = sorted(values)

        def at(part: float) -> float:
            place = part * (len(ranked) - 1)
            low = int(place)
            high = min(low + 1, len(ranked) - 1)
            return ranked[low] + (place - low) * (ranked[high] - ranked[low])

        return cls(statistics.median(ranked), at(0.2), at(0.8))


@dataclass
class Measurement:
    """What is known of one call: the first, watched for memory, and the timed ones after it."""

    first: float
    """Seconds of the watched call; of a peer measured on fewer rows, the estimate for all."""
    peak_mib: float | None
    """Most memory held at any moment of it above what was held before, gradients included."""
    times: list[float] = field(default_factory=list)
    note: str = ""
    dtype: str = ""
    """Of this call's inputs, where they are not those of everybody."""

    @property
    def seconds(self) -> Quantiles:
        return Quantiles.of(self.times or [self.first])

    @property
    def rounds(self) -> int:
        return max(1, len(self.times))

    def over(self, others: list[Measurement]) -> Quantiles:
        """This time over the sum of the others': ratios of one round, quantiles over the rounds.

        A call that was timed in no round is compared with the others' medians.
        """
        if self.times and all(len(other.times) == len(self.times) for other in others):
            rounds = zip(self.times, *(other.times for other in others), strict=True)
            return Quantiles.of([mine / sum(rest) for mine, *rest in rounds])
        return Quantiles.of([self.seconds.median / sum(other.seconds.median for other in others)])


def timed(call: Call, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def watched(call: Call, device: torch.device) -> Measurement:
    """One call with its peak memory. On a CPU a thread samples the resident set every 2 ms."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = timed(call, device)
        return Measurement(seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20)
    resident = _resident_reader()
    if resident is None:  # not Linux
        return Measurement(timed(call, device), None)
    from kepo_kernels.compute import pages  # here, because plot.py has no need of the package

    done, peak = threading.Event(), [0]
    # What earlier calls freed, or left for the next one, must not hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    pages.release()
    before = resident()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        seconds = timed(call, device)
        peak[0] = max(peak[0], resident())
    finally:
        done.set()
        watcher.join()
    return Measurement(seconds, max(0, peak[0] - before) / 2**20)


def time_in_turn(
    calls: dict[Hashable, Call], measured: dict[Hashable, Measurement], device: torch.device
) -> None:
    """One round, every call once: a machine that slows down slows all of them."""
    for key, call in calls.items():
        if device.type == "cpu":
            _settle(measured[key].peak_mib or 0)
        measured[key].times.append(timed(call, device))


def _settle(mib: float) -> None:
    """Writes as much memory as the call will need, and frees it.

    A virtual machine's host takes back what lies free for some seconds, and the next call to use it
    would pay a millisecond per MiB for it: as much as a tenth of a loss, at random.
    """
    torch.ones(int((mib + 64) * 2**18))


def estimated(
    call_of: Callable[[int], Call],
    rows: int,
    device: torch.device,
    *,
    longest: float,
    compiles: bool = False,
) -> Measurement | None:
    """A slow peer's time for all rows from calls on a few; None when it can be timed as it is.

    Rows are doubled up to a quarter of all, or until a call takes `longest` seconds. The time of
    all rows is read off the line through the last two points: what a call costs whatever its rows
    (a pass over the head, say) is not multiplied, nor is what only the fewest rows pay. None if
    that is at most `longest`. A peer that `compiles` runs each number of rows once before it is
    timed.
    """

    def point(rows: int) -> tuple[int, float]:
        call = call_of(rows)
        return rows, min(timed(call, device) for _ in range(2))

    few = min(8, rows)
    timed(call_of(few), device)  # imports, compilation
    before, last = None, point(few)
    while True:
        few, seconds = last
        if seconds * rows / few <= longest or 2 * few >= rows:  # the line can promise no more
            return None
        if before and (4 * few >= rows or seconds >= longest):
            slope = max(0.0, (seconds - before[1]) / (few - before[0]))
            promised = seconds + slope * (rows - few)
            if promised <= longest:
                return None
            note = f"time scaled from calls of {before[0]} and {few} rows; memory not measured"
            return Measurement(promised, None, note=note)
        if compiles:
            timed(call_of(2 * few), device)
        before, last = last, point(2 * few)


def _resident_reader() -> Callable[[], int] | None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return lambda: int(statm.read_text(encoding="utf-8").split()[1]) * page


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
