"""The ranks of a run: which rank this is, one decision for all, work shared out among them.

All ranks hold the same view of a step: the same questions, and after sampling the same completions.
They differ only where a function here gives each a share, so there is nothing they could disagree
about. Without torchrun there is one rank, 0: it does all the work, and nothing is exchanged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kepo.distributed.watchdog import LEAVING_SECONDS, watched
from kepo.errors import KepoConfigError, KepoError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = 15 * 60.0
"""Seconds a rank may stand still, or be late at the start, before all ranks end."""
REFUSAL_SECONDS = 30.0
"""Seconds that a rank which cannot start waits for the others to come and read its error."""
DECISION_TIMEOUT = timedelta(days=1)
"""The timeout of an exchange of Python objects. It is long because the others wait in one while
rank 0 reads a dataset; a rank that stands still ends the run earlier, through `watched`."""
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets; only all of them make a process one of several."""

_control: dist.ProcessGroup | None = None
"""The group for decisions and Python objects, on the CPU; None = the default one."""


@contextmanager
def processes(
    device: str, *, alone: bool = False, timeout: float = TIMEOUT
) -> Iterator[torch.device]:
    """Join the ranks that torchrun started, if it did; yield this rank's own device.

    ``cuda`` becomes ``cuda:<local rank>``. alone: without torchrun, form a group of one, which
    sharding needs. timeout: seconds after which a rank that does not come to the start, or stands
    still, is named and all ranks end. A process group that is there already is used as it is.
    Raises KepoConfigError where the environment or the devices do not fit, KepoError if a rank does
    not come.
    """
    several = world_size() > 1 if dist.is_initialized() else launched() > 1
    with errors_end_all_ranks():
        own = _own_device(device, several)
    started = (several or alone) and not dist.is_initialized()
    with ExitStack() as stack:
        if started and several:
            _join(own, timeout, stack)
        elif started:
            backend = _backend(own)
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield own
        except BaseException as error:
            if started:
                _give_up()
            if several and isinstance(error, RuntimeError) and _is_lost_peer(error):
                raise _lost_peer(error) from error
            raise
        if started:
            _leave()


def launched() -> int:
    """Return the number of processes that torchrun, or a launcher that sets the same variables,
    started; 1 if none did.

    A scheduler may set WORLD_SIZE for its own ends. Raises KepoConfigError if it says that there
    are several, and a variable by which they find each other is missing.
    """
    given = {name: os.environ.get(name, "") for name in LAUNCH}
    missing = [name for name, value in given.items() if not value]
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if given[name] and not given[name].isdecimal():
            raise KepoConfigError(f"{name}={given[name]!r}; expected a number >= 0")
    size = int(given["WORLD_SIZE"] or 1)
    if size > 1 and missing:
        raise KepoConfigError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set, so processes "
            f"cannot find each other; start them with `torchrun --nproc-per-node={size} -m "
            "kepo train ...`, or unset WORLD_SIZE for one process"
        )
    if not missing and int(given["RANK"]) >= size:
        raise KepoConfigError(
            f"RANK={given['RANK']} and WORLD_SIZE={size}; expected a rank below it"
        )
    return size


def _own_device(device: str, several: bool) -> torch.device:
    own = torch.device(device)
    if own.type != "cuda":
        return own
    count = torch.cuda.device_count()
    local = os.environ.get("LOCAL_RANK", "") if several else "0"
    if own.index is None and not local and count > 1:
        raise KepoConfigError(
            f"LOCAL_RANK is not set, so which of the {count} CUDA devices is this "
            "process's is unknown; start it with torchrun"
        )
    place = int(local or 0) if own.index is None else own.index
    if place >= count:
        which = f"LOCAL_RANK={place}" if own.index is None else f"device={device!r}"
        raise KepoConfigError(
            f"{which}, but this process sees {count} CUDA devices; start one process per device: "
            f"torchrun --nproc-per-node={count}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _backend(device: torch.device) -> str:
    """Return the backend of the process group: gloo, and on GPUs also NCCL for CUDA tensors.

    "cpu:gloo" would be a group without a default backend, of which torch warns at its end.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _join(device: torch.device, timeout: float, stack: ExitStack) -> None:
    """Form the group that torchrun describes, and watch it until ``stack`` ends."""
    global _control
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    waited = f"within {timeout / 60:g} minutes (rank_timeout_minutes)"
    try:
        store, private = _stores(limit)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise KepoError(
            f"rank {rank}: the {size} processes of this run have not all met at {place} "
            f"{waited}: {str(error).splitlines()[0]}"
        ) from error
    if late := _late(private, rank, size, timeout):
        raise KepoError(f"rank {rank}: {ranks(late)} did not come to the start {waited}")
    if refused := _refusals(private, rank, size):
        said = "; ".join(f"rank {other}: {text}" for other, text in refused.items())
        raise KepoError(f"rank {rank} ends, as another cannot start: {said}")
    backend = _backend(device)
    # Within a step ranks are seconds apart; of longer waits `watched` names the culprit before.
    apart = max(2 * limit, timedelta(minutes=10))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=apart)
    _control = dist.new_group(backend="gloo", timeout=DECISION_TIMEOUT)
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process
    server = store if rank == 0 and not agents else None
    stack.enter_context(watched(private, rank, size, timeout, server))


def _stores(limit: timedelta) -> tuple[dist.Store, dist.Store]:
    """Return the store in which torchrun's ranks meet, and a client of it for this package."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    own = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    # torchrun may start processes anew in the same store.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store, dist.PrefixStore(f"kepo/{again}", own)


@contextmanager
def errors_end_all_ranks() -> Iterator[None]:
    """End the other ranks, with the same error, if an error within the block ends this one before
    it has met them; they would wait for it.

    It may be a KepoError, an OSError, or the SystemExit of a command line that cannot be read. Does
    nothing in a single process, or after this rank has met the others.
    """
    try:
        yield
    except (KepoError, OSError, SystemExit) as error:
        fails = not isinstance(error, SystemExit) or error.code not in (0, None)
        with suppress(KepoError):  # of `launched`: the other ranks cannot be found then
            if fails and not dist.is_initialized() and launched() > 1:
                says = not isinstance(error, SystemExit)
                _tell(str(error) if says else "its command line cannot be read, see what it said")
        raise


def _tell(refusal: str) -> None:
    """Meet the other ranks instead of joining them, and wait until they have read ``refusal``."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with suppress(RuntimeError):  # they have not come, or have left
        store, private = _stores(timedelta(seconds=REFUSAL_SECONDS))
        _late(private, rank, size, REFUSAL_SECONDS, refusal)
        _refusals(private, rank, size)
        del store  # rank 0 has the server in it


def _refusals(store: dist.Store, rank: int, size: int) -> dict[int, str]:
    """Return the errors of the ranks that cannot start, by rank. Rank 0 waits until all ranks have
    read them: the server may end with rank 0."""
    said = {other: store.get(f"here/{other}").decode() for other in range(size)}
    refused = {other: text for other, text in said.items() if text}
    if refused:
        store.set(f"read/{rank}", "")
        if rank == 0:
            with suppress(RuntimeError):
                store.wait(
                    [f"read/{other}" for other in range(size)], timedelta(seconds=REFUSAL_SECONDS)
                )
    return refused


def _late(store: dist.Store, rank: int, size: int, timeout: float, refusal: str = "") -> list[int]:
    """Return the ranks that have not come to this place after ``timeout`` seconds.

    refusal: why this rank will not go on, for the others to read by `_refusals`.
    """
    store.set(f"here/{rank}", refusal)
    end = time.monotonic() + timeout
    late = []
    for other in range(size):
        left = timedelta(seconds=max(0.1, end - time.monotonic()))
        try:
            store.wait([f"here/{other}"], left)
        except RuntimeError:
            late.append(other)
    return late


def _leave() -> None:
    global _control
    _control = None
    dist.destroy_process_group()


def _give_up() -> None:
    """Leave the process group within LEAVING_SECONDS, or else without its consent: if others are in
    a collective with this rank, leaving would wait for them. torchrun ends them.

    Without it, Python may end while a thread of gloo gives back the last collective's tensors. That
    thread asks for Python's lock, gets none, and the process aborts after it has printed its error.
    """
    leaving = threading.Thread(target=_leave, daemon=True)
    leaving.start()
    leaving.join(LEAVING_SECONDS)


def ranks(places: Sequence[int]) -> str:
    """Return \"rank 3\", or \"ranks 0-2, 5\"."""
    runs: list[list[int]] = []
    for place in sorted(places):
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(places) == 1 else f"ranks {text}"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Return whether this is rank 0, the one that writes and prints."""
    return rank() == 0


def all_gather(mine: T) -> list[T]:
    """Return the objects that the ranks passed, which must pickle, by rank. All ranks call."""
    if world_size() == 1:
        return [mine]
    everyones: list[T] = [None] * world_size()  # type: ignore[list-item]
    _collective(dist.all_gather_object, everyones, mine)
    return everyones


def _collective(exchange: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    try:
        exchange(*arguments, group=_control, **settings)
    except RuntimeError as error:
        raise _lost_peer(error) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _lost_peer(error: RuntimeError) -> KepoError:
    # "[file of gloo:line] Connection closed by peer [host]:port. This is typically ..."
    said = str(error).splitlines()[0].split(". ")[0]
    said = said.rpartition(".cc:")[2].partition("] ")[2] or said
    return KepoError(
        f"rank {rank()}: another process of this run has ended, or cannot be reached ({said}); the "
        "cause is what it said itself"
    )


def any_rank(mine: bool) -> bool:
    """Return whether ``mine`` is true on any rank. All ranks call."""
    return any(all_gather(bool(mine)))


def on_rank0(make: Callable[[], T]) -> T:
    """Return, on every rank, what ``make`` returns on rank 0. All ranks call.

    A KepoError or OSError that it raises there is raised on every rank, so that none waits for one
    that left.
    """
    outcome: list[object] = [None, None]
    if is_rank0():
        try:
            outcome[0] = make()
        except (KepoError, OSError) as error:
            outcome[1] = error
    if world_size() > 1:
        _collective(dist.broadcast_object_list, outcome, src=0)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise an error of the block, a KepoError or OSError, on every rank, so that none waits for
    one that left. All ranks call; within the block they work apart."""
    mine: Exception | None = None
    try:
        yield
    except (KepoError, OSError) as error:
        mine = error
    for one in all_gather(mine):
        if one is not None:
            raise one


def rank_slice(items: Sequence[T], place: int | None = None) -> Sequence[T]:
    """Return the part of ``items`` that belongs to one rank (None = this one). The parts are
    contiguous, in order of rank, and differ in length by at most one."""
    place = rank() if place is None else place
    start, end = (len(items) * i // world_size() for i in (place, place + 1))
    return items[start:end]


class Stopped(Exception):
    """Raised on every rank when shared work ends early because one rank was asked to stop."""


def split_work(
    items: Sequence[T],
    work: Callable[[Sequence[T]], list[R]],
    portions: Callable[[Sequence[T]], Sequence[Sequence[T]]],
    *,
    collective: bool = False,
    stop: Callable[[], bool] | None = None,
    finish: Callable[[list[R]], list[R]] = lambda results: results,
) -> list[R]:
    """Share the items out over the ranks; return ``work``'s results for all items, on every rank.

    portions: cuts a share into what is worked on at once; ``work`` returns one result per item of a
    portion. collective: ``work`` needs the other ranks too (a sharded model), so those with fewer
    portions repeat one for them and drop its results. stop: called before every portion; once it is
    true on one rank, `Stopped` is raised on all. finish: called once, with all results of this
    rank, before they are gathered. All ranks call, with the same items. A KepoError on one rank is
    raised on all, unless the work is collective.
    """
    if not items:
        return []
    mine = portions(rank_slice(items)) if rank_slice(items) else []
    rounds = max(all_gather(len(mine))) if collective else len(mine)
    results: list[R] = []
    ended = False
    failed: KepoError | None = None
    try:
        for place in range(rounds):
            if stop is not None:
                ended = any_rank(stop()) if collective else stop()
            if ended:
                break
            if place < len(mine):
                results += work(mine[place])
            else:
                work(mine[0] if mine else items[:1])
        results = [] if ended else finish(results)
    except KepoError as error:
        if collective:  # the others are in the midst of it, and learn that this rank has left
            raise
        failed = error
    parts = all_gather((results, ended, failed))
    for _, _, fault in parts:
        if fault is not None:
            raise fault
    if any(ended for _, ended, _ in parts):
        raise Stopped
    return [result for part, _, _ in parts for result in part]


def batches_of(most: int) -> Callable[[Sequence[T]], list[Sequence[T]]]:
    """Return a ``portions`` for `split_work` that cuts a share into at most ``most`` items each."""
    return lambda share: [share[start : start + most] for start in range(0, len(share), most)]
