"""Does a peer survive here? Its first calls, in a process of their own.

On some processors what torch.compile makes of a peer corrupts the heap, and a process that dies
takes the whole bench with it. Here it takes its own only. What it compiled is not lost: the bench
finds it in inductor's cache on disk.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.losses.losses_of_ours import NotComparable
from benchmarks.losses.measure import Call, timed
from benchmarks.losses.problems import Problem, Shape

FEW = 8  # rows, as many as the bench begins with
QUICK = 10.0  # seconds for all rows, by the few
PATIENCE = 300.0  # seconds, compilation on a slow machine included

# A server imports once what takes seconds, and every attempt is forked from it. Not from the bench:
# the threads of its matrix products would be missing in a fork.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "torch._inductor.compile_fx"])

Provider = Callable[[Problem, str], Call]


def must_survive(
    provider: Provider, case: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """NotComparable if the calls end their process by a signal, or do not end in `PATIENCE`.

    An exception is no reason to refuse: it comes again in the bench, which names it.
    """
    process = PROCESSES.Process(target=_attempt, args=(provider, case, shape, dtype, device))
    process.start()
    try:
        process.join(PATIENCE)
        code = process.exitcode
    finally:
        process.kill()
        process.join()
    if code is None:
        raise NotComparable(f"hangs here: its first calls do not end in {PATIENCE:g} s")
    if code < 0:
        raise NotComparable(f"crashes here: {signal.Signals(-code).name}")


def _attempt(
    provider: Provider, case: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """A few rows, twice; all of them where that is quick, since they run other code: a second
    number of rows makes torch.compile write what holds for any."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)

    def head(width: int) -> Tensor:
        return torch.zeros(shape.vocab, width, dtype=dtype, device=device)

    # Sizes matter here, numbers do not, and to draw two heads takes seconds.
    narrow = Problem.make(replace(shape, vocab=min(shape.vocab, 8)), dtype, device)
    problem = replace(
        narrow,
        lm_head=head(shape.hidden).requires_grad_(),
        teacher_lm_head=head(shape.teacher_hidden),
    )
    few = problem.first_rows(FEW)
    call = provider(few, case)
    timed(call, device)
    if timed(call, device) * problem.rows / few.rows <= QUICK:
        timed(provider(problem, case), device)
