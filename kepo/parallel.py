"""The processes of a run: who is who, one decision for all, work shared out among them.

All processes hold the same view of a step: the same questions, and after sampling the same
completions. They part only where a function here gives each a share, so there is nothing they could
disagree about. Alone, without torchrun, every function does the obvious.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from kepo.errors import KepoError

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: they may be reading a dataset, or writing hints."""


@contextmanager
def processes(device: str, *, alone: bool = False) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's own device.

    ``cuda`` becomes ``cuda:<local rank>``. alone: without torchrun, form a group of one, which
    sharding needs. A process group that is there already is used as it is.
    """
    own = torch.device(device)
    if own.type == "cuda" and own.index is None:
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    several = "WORLD_SIZE" in os.environ
    started = (several or alone) and not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "cpu:gloo"
        here = {} if several else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, timeout=PATIENCE, **here)
    try:
        yield own
    except BaseException:
        # Others may be waiting for this one in a collective, and then so would the farewell: it
        # just leaves, and torchrun ends them.
        if started and not several:
            dist.destroy_process_group()
        raise
    if started:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def together(mine: T) -> list[T]:
    """What each process passed, by rank; any object that pickles. All must call."""
    if world_size() == 1:
        return [mine]
    everyones: list[T] = [None] * world_size()  # type: ignore[list-item]
    dist.all_gather_object(everyones, mine)
    return everyones


def any_of(mine: bool) -> bool:
    """Whether it holds in any process. All must call."""
    return any(together(bool(mine)))


def by_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, in every process. All must call.

    A KepoError or OSError it raises there is raised everywhere, so that no process waits for one
    that left.
    """
    outcome: list[object] = [None, None]
    if is_first():
        try:
            outcome[0] = make()
        except (KepoError, OSError) as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def share_of(items: Sequence[T], place: int | None = None) -> Sequence[T]:
    """The part of ``items`` that belongs to one process (None = this one): runs of equal length,
    up to one, in order of rank."""
    place = rank() if place is None else place
    start, end = (len(items) * i // world_size() for i in (place, place + 1))
    return items[start:end]


def shared_out(
    items: Sequence[T],
    work: Callable[[Sequence[T]], list[R]],
    portions: Callable[[Sequence[T]], list[Sequence[T]]],
    *,
    in_step: bool = False,
) -> list[R]:
    """``work`` of all items, each process having done its share; the same list in every process.

    portions: cuts a share into what is worked on at once; ``work`` returns one result per item of
    it. in_step: ``work`` needs the other processes too (a sharded model), so those with fewer
    portions repeat one for them and drop its results. All must call, with the same items.
    """
    if not items:
        return []
    mine = portions(share_of(items)) if share_of(items) else []
    rounds = max(together(len(mine))) if in_step else len(mine)
    results: list[R] = []
    for place in range(rounds):
        if place < len(mine):
            results += work(mine[place])
        else:
            work(mine[0] if mine else items[:1])
    return [result for part in together(results) for result in part]


def runs_of(most: int) -> Callable[[Sequence[T]], list[Sequence[T]]]:
    """Portions for `shared_out` of at most so many items, in order."""
    return lambda share: [share[start : start + most] for start in range(0, len(share), most)]
