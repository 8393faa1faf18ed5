"""A rank that stands still is named, by itself or by the others, and all of them end.

Each rank looks at itself: whether its Python threads have used the processor since the last look,
and where in the code it stands. It tells the others over a store of their own. One that has done
nothing for the time limit and is not waiting for another is stalled, and so is one of which nothing
was heard for as long: stopped, or its machine gone. Reading a dataset for an hour is work, and may
take that hour. A rank that computes for ever is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

LONGEST_PAUSE = 5.0  # seconds between two looks
LEAVING_SECONDS = 2.0  # that a rank which ends waits for its group, or for the others to end
PAUSED = 4  # pauses without a look: this rank itself was stopped
WORK = 0.001  # of the limit: who uses the processor for less only sleeps in a loop
WAITING = ("/torch/distributed/", "/torch/autograd/")
"""Paths of code in which a rank waits for others; in autograd, for their gradients."""
PACKAGE = Path(__file__).parents[1]
OURS = (f"{PACKAGE}/", f"{PACKAGE}_kernels/")


class Report(NamedTuple):
    """The state that a rank reports to the others."""

    beat: int
    """A number that differs from one report to the next."""
    still: float
    """Seconds for which the rank has done nothing."""
    waits: bool
    """True if the rank stands in code that waits for other ranks; see WAITING."""
    place: str
    """The function, file and line where the rank stands."""
    left: bool = False
    """True if the rank has ended on purpose."""


@contextmanager
def watched(
    store: dist.Store, rank: int, world_size: int, limit: float, server: dist.Store | None = None
) -> Iterator[None]:
    """End this rank, with a sentence and exit code 1, once any rank stands still for ``limit``
    seconds.

    All ranks call, with clients of the same store, which nothing else may use. server: the server
    of the store, on the one rank that has it, which leaves last if it can; None elsewhere.
    """
    over = threading.Event()
    pause = min(LONGEST_PAUSE, limit / 10)
    mine = [Report(0, 0.0, False, "the start")]
    heard: dict[int, tuple[Report, float]] = {}
    verdict: list[str] = []
    thread = threading.get_ident()

    def talk() -> None:
        """Exchange reports apart from `judge`: a store whose host stands still may never answer."""
        while True:
            last = over.wait(pause)
            with suppress(RuntimeError, ValueError):  # no answer is no news
                report = mine[0]._replace(left=True) if last else mine[0]
                store.set(f"rank/{rank}", json.dumps(report))
                if last:
                    return
                if verdict:
                    store.set("ended", verdict[0])
                elif store.check(["ended"]):
                    verdict.append(store.get("ended").decode())
                for other in range(world_size):
                    if other != rank and store.check([f"rank/{other}"]):
                        news = Report(*json.loads(store.get(f"rank/{other}")))
                        before = heard.get(other)
                        if before is None or before[0].beat != news.beat:
                            heard[other] = (news, time.monotonic())
            if last:
                return

    def judge() -> None:
        since = looked = moved = time.monotonic()
        used = processor_seconds()
        while not over.wait(pause):
            now = time.monotonic()
            if now - looked > PAUSED * pause:  # a scheduler held all of it, and the others perhaps
                since = moved = now
            looked = now
            uses = processor_seconds()
            if abs(uses - used) > WORK * limit:  # abs: threads end
                moved, used = now, uses
            waits, place = standing(sys._current_frames().get(thread))
            mine[0] = Report(mine[0].beat + 1, now - moved, waits, place)
            reports = {rank: mine[0]}
            for other in range(world_size):
                if other != rank:
                    news, at = heard.get(other, (Report(0, 0.0, False, "the start"), since))
                    silent = now - max(at, since)
                    if silent > 3 * pause and not news.left:
                        said = f"nothing heard of it since {news.place}"
                        news = news._replace(still=max(news.still, silent), place=said, waits=False)
                    reports[other] = news
            if not verdict and (found := stalled(reports, limit)):
                verdict.append(found)
            if verdict:
                with suppress(OSError):
                    os.write(2, f"\nerror: {verdict[0]}\n".encode(errors="backslashreplace"))
                over.wait(2 * pause)  # for the others to read it too
                os._exit(1)  # whatever the main thread stands in will not return

    workers = [threading.Thread(target=f, daemon=True) for f in (talk, judge)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        workers[0].join(LEAVING_SECONDS)
        if server is not None:
            _wait_for_others_to_leave(store, rank, world_size)


def _wait_for_others_to_leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Wait until the other ranks have reported that they left, LEAVING_SECONDS at most."""
    end = time.monotonic() + LEAVING_SECONDS
    here = {other for other in range(world_size) if other != rank}
    while here and time.monotonic() < end:
        with suppress(RuntimeError, ValueError):
            for other in sorted(here):
                name = f"rank/{other}"
                if store.check([name]) and Report(*json.loads(store.get(name))).left:
                    here.discard(other)
        time.sleep(0.05)


def stalled(reports: dict[int, Report], limit: float) -> str | None:
    """Return the sentence that ends a run and names the stalled ranks; None while there are none.

    limit: seconds. Ranks that wait for others are to blame only if every rank waits.
    """
    here = {rank: report for rank, report in reports.items() if not report.left}
    still = [rank for rank, report in here.items() if report.still >= limit]
    named = [rank for rank in still if not here[rank].waits]
    if not named and len(still) < len(here):
        return None
    others = [rank for rank in sorted(here) if rank not in named]
    rest = "; ".join(f"rank {rank}: {here[rank].place}" for rank in others[:8])
    limits = f"(rank_timeout_minutes: {limit / 60:g})"
    if not named:
        return f"every rank waits for another, for {_span(limit)} {limits}: {rest}"
    blamed = "; ".join(
        f"rank {rank} has not moved for {_span(here[rank].still)} ({here[rank].place})"
        for rank in sorted(named)
    )
    return f"{blamed} {limits}" + (f"; {rest}" if rest else "")


def standing(frame: FrameType | None) -> tuple[bool, str]:
    """Return ``(whether a thread waits for other ranks, where it stands)``, from its innermost
    frame."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not frames:
        return False, "no code"
    inner = next(
        (place for place, (file, _, _) in enumerate(frames) if _is_ours(file)), len(frames) - 1
    )
    in_torch = "/torch/" in frames[0][0]
    waits = in_torch and any(mark in file for file, _, _ in frames[:inner] for mark in WAITING)
    shown = [frames[0]] if inner == 0 else [frames[0], frames[inner]]
    return waits, ", for ".join(f"{name} at {_short(file)}:{line}" for file, line, name in shown)


def processor_seconds() -> float:
    """Return the processor time of this process's Python threads, those in the background left out.

    The time of the whole process would not do: NCCL's threads spin while they wait.
    """
    threads = [thread.native_id for thread in threading.enumerate() if not thread.daemon]
    try:
        return sum(_seconds(thread) for thread in threads)
    except FileNotFoundError:  # no /proc here
        return time.process_time()


def _seconds(thread: int | None) -> float:
    try:
        text = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():  # it has ended
            return 0.0
        raise
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _is_ours(file: str) -> bool:
    return file.startswith(OURS) and not file.endswith("/kepo/distributed/processes.py")


def _short(file: str) -> str:
    parts: Sequence[str] = Path(file).parts
    return "/".join(parts[-2:])


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
