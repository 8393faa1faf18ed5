"""What decides between designs: the products by chunk length, the row kernels by launch parameters,
the host's share of a call, and where the device's time goes.

A row that fails holds the reason; the others are still measured.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.targets import FIRST_SHAPE
from benchmarks.gpu.timings import SHAPES, TINY, own, plain_row, recover
from benchmarks.losses.problems import Problem, Shape
from benchmarks.losses.table import Row
from kepo_kernels.compute import autograd

REP = 100  # milliseconds of calls for a row
CHUNKS = (2048, 1639, 1366, 4096)
# Constants of kepo_kernels.rows.triton_rows to try beside those that stand there: of the
# softmaxes, and of the other kernels.
SOFTMAXES = (
    {"SOFTMAX_BLOCK": 8192},
    {"SOFTMAX_BLOCK": 2048},
    {"SOFTMAX_BLOCK": 4096, "SOFTMAX_COLUMNS_PER_THREAD": 16},
    {"SOFTMAX_BLOCK": 8192, "SOFTMAX_COLUMNS_PER_THREAD": 16},
    {"SOFTMAX_BLOCK": 16384, "SOFTMAX_COLUMNS_PER_THREAD": 32},
)
OTHERS = (
    {"STAGES": 1},
    {"STAGES": 3},
    {"STAGES": 1, "BLOCK": 1024},
    {"STAGES": 1, "BLOCK": 4096},
    {"STAGES": 1, "COLUMNS_PER_THREAD": 16},
    {"STAGES": 1, "BLOCK": 1024, "COLUMNS_PER_THREAD": 4},
    {"STAGES": 1, "SECTION": 8192},
    {"STAGES": 1, "SECTION": 32768},
)
FEWEST = 4.0  # seconds that must be left for one more row

Call = Callable[[], object]


def probe(clock: Clock) -> Iterator[Row]:
    yield from products(clock)
    yield from head_gradient(clock)
    yield from rows(clock)


def tried(
    clock: Clock, case: str, variant: str, call: Call, moved: float = 0, flop: float = 0
) -> Iterator[Row]:
    """One row, or none when the time is over."""
    if clock.left() < FEWEST:
        return
    try:
        call()
        yield plain_row(f"probe_{case}", variant, clock.time(call, REP), "", moved, flop)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        words = f"fails here: {type(error).__name__}: {error}".splitlines()[0][:120]
        yield {"case": f"probe_{case}", "provider": variant, "note": words}
        recover(clock)


def sizes_of(clock: Clock) -> tuple[int, int, int, int]:
    return SHAPES[FIRST_SHAPE] if clock.cuda else TINY


def normal(clock: Clock, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or (torch.bfloat16 if clock.cuda else torch.float32)
    return torch.randn(*shape, device=clock.device, dtype=dtype)


def products(clock: Clock) -> Iterator[Row]:
    """Of 16-bit operands to fp32 (`wide`) and to 16 bits, in chunks of so many rows."""
    _, hidden, teacher_hidden, vocab = sizes_of(clock)
    w, teacher_w = normal(clock, vocab, hidden), normal(clock, vocab, teacher_hidden)
    out_dtype = {"out_dtype": torch.float32} if clock.cuda else {}
    dw = torch.zeros(vocab, hidden, device=clock.device)
    for chunk in CHUNKS if clock.cuda else (8,):
        x, y = normal(clock, chunk, hidden), normal(clock, chunk, teacher_hidden)
        wide = torch.empty(chunk, vocab, device=clock.device)
        narrow = normal(clock, chunk, vocab)  # with zeros a GPU needs less power and is faster
        flop = 2.0 * chunk * vocab * hidden
        calls: dict[str, Call] = {
            "logits wide": partial(torch.mm, x, w.T, **out_dtype, out=wide),
            "teacher wide": partial(torch.mm, y, teacher_w.T, **out_dtype, out=wide),
            "logits": partial(torch.mm, x, w.T, out=narrow),
            "dW += wide": partial(torch.addmm, dw, narrow.T, x, **out_dtype, out=dw),
            "dW = wide": partial(torch.mm, narrow.T, x, **out_dtype, out=dw),
            "dX wide": partial(torch.mm, narrow, w, **out_dtype),
            "dX": partial(torch.mm, narrow, w),
        }
        for name, call in calls.items():
            times = teacher_hidden / hidden if name.startswith("teacher") else 1.0
            yield from tried(clock, "product", f"{name}, {chunk} rows", call, 0, flop * times)
    if clock.cuda:
        fp8, one = torch.float8_e4m3fn, torch.ones((), device=clock.device)
        a, b = normal(clock, 2048, teacher_hidden).to(fp8), teacher_w.to(fp8)
        scaled = partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16)
        flop = 2.0 * 2048 * vocab * teacher_hidden
        yield from tried(clock, "product", "teacher fp8, 2048 rows", scaled, 0, flop)


def head_gradient(clock: Clock) -> Iterator[Row]:
    """From fp32 to the head's dtype, scaled: as the package does it, and in one launch."""

    _, hidden, _, vocab = sizes_of(clock)
    gradient = normal(clock, vocab, hidden, dtype=torch.float32)
    out = normal(clock, vocab, hidden)
    factor = torch.full((), 0.5, device=clock.device)
    moved = gradient.nbytes + out.nbytes
    yield from tried(
        clock, "scaled", "ours", lambda: autograd.scaled(gradient, factor, out.dtype), moved
    )
    one = partial(torch.mul, gradient, factor, out=out)
    yield from tried(clock, "scaled", "one launch", one, moved)


def rows(clock: Clock) -> Iterator[Row]:
    """The row kernels alone, by divergence, dtype of the logits and launch parameters."""
    from kepo_kernels.compute import gemm
    from kepo_kernels.rows.contract import RowSettings
    from kepo_kernels.rows.dispatch import pick_rows

    count, vocab = (2048, sizes_of(clock)[3]) if clock.cuda else (8, 512)
    kinds = {"none": 0.5, "KL": 0.0, "JSD": 0.5}
    wanted = [(torch.float32, kind, {}) for kind in kinds]
    wanted += [(torch.bfloat16, "JSD", {})]
    wanted += [(torch.float32, "none", launch) for launch in SOFTMAXES]
    wanted += [(torch.float32, "JSD", launch) for launch in OTHERS]
    for dtype, kind, launch in wanted:
        logits, teacher = (normal(clock, count, vocab, dtype=dtype) for _ in range(2))
        targets = torch.randint(vocab, (count,), device=clock.device)
        back = torch.randn(3, count, device=clock.device)
        settings = RowSettings(beta=kinds[kind])
        kernels = pick_rows("auto", clock.device, dtype)
        sides = (logits, targets, None if kind == "none" else teacher)
        out = torch.empty_like(
            logits, dtype=gemm.dlogits_dtype(torch.bfloat16, dtype, clock.device)
        )
        words = [f"{name.lower()} {value}" for name, value in launch.items()]
        variant = ", ".join([kind, str(dtype)[6:], *words])
        one, two = logits.nbytes, logits.nbytes * (1 if kind == "none" else 2)
        with launched(launch):
            # A softmax of each side, and a divergence that reads both again.
            moved = one if kind == "none" else 2 * two
            forward = partial(kernels.row_forward, *sides, settings)
            yield from tried(clock, "row_forward", variant, forward, moved)
            if clock.left() < FEWEST:
                return
            try:
                made = forward()
            except Exception:  # its row says why
                continue
            backward = partial(kernels.row_backward_, *sides, made, back, settings, out)
            if not any(name.startswith("SOFTMAX") for name in launch):
                yield from tried(clock, "row_backward", variant, backward, two + out.nbytes)


@contextmanager
def launched(launch: dict[str, int]) -> Iterator[None]:
    """Triton's rows with these launch parameters."""
    from kepo_kernels.rows import triton_rows

    before = {name: getattr(triton_rows, name) for name in launch}
    try:
        for name, value in launch.items():
            setattr(triton_rows, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(triton_rows, name, value)


def host(clock: Clock) -> Iterator[Row]:
    """Seconds until a call returns, and until the device is done with it.

    Of the small shape, where the host is what takes the time, Python's own profile goes to the log.
    """
    for shape in (FIRST_SHAPE, "small"):
        sizes = SHAPES[shape] if clock.cuda else TINY
        dtype = torch.bfloat16 if clock.cuda else torch.float32
        problem = Problem.make(Shape(shape, *sizes, {}), dtype, clock.device)
        for case in ("kd_open", "grpo"):
            call = own(problem, case)
            for _ in range(3):
                call()
            recover(clock)
            began = time.perf_counter()
            call()
            returned = time.perf_counter() - began
            recover(clock)
            done = time.perf_counter() - began
            note = f"{shape}: done after {1e3 * done:.2f} ms"
            yield {"case": f"host_{case}", "provider": "ours", "seconds": returned, "note": note}
            if shape == "small":
                with cProfile.Profile() as profiled:
                    for _ in range(20):
                        call()
                pstats.Stats(profiled, stream=sys.stdout).sort_stats("tottime").print_stats(30)


def profile(clock: Clock) -> Iterator[Row]:
    """Which kernels of a call take how long, and how many launches it has."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activity = ProfilerActivity.CUDA if clock.cuda else ProfilerActivity.CPU
    total = "self_device_time_total" if clock.cuda else "self_cpu_time_total"
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    problem = Problem.make(Shape(FIRST_SHAPE, *sizes_of(clock), {}), dtype, clock.device)
    for case in ("kd_open", "grpo"):
        call = own(problem, case)
        call()
        recover(clock)
        with profiled(activities=[activity]) as found:
            call()
            recover(clock)
        kernels = [event for event in found.key_averages() if getattr(event, total) > 0]
        kernels.sort(key=lambda event: -getattr(event, total))
        sums = sum(event.count for event in kernels), sum(getattr(e, total) for e in kernels)
        entries = [("all kernels", *sums)]
        entries += [(event.key, event.count, getattr(event, total)) for event in kernels[:12]]
        for name, launches, microseconds in entries:
            row = {"case": f"profile_{case}", "provider": name[:60], "seconds": microseconds / 1e6}
            yield row | {"note": f"{launches} launches"}


SECTIONS: dict[str, Callable[[Clock], Iterator[Row]]] = {
    "host": host,
    "probe": probe,
    "profile": profile,
}
