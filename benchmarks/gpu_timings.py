"""Times on a device: measured ceilings, the bare row kernels, our losses, and those of others.

Each function yields tidy rows, one as soon as it is known. On a CPU the same code times each call
three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from floor import floor
from losses_of_ours import NotComparable, ours
from measure import Measurement, Quantiles, timed, watched
from peers import PEERS, _imported, _open_rows
from problems import Problem, Shape
from table import Row, measured_row
from torch import Tensor

import kepo_kernels
from kepo_kernels.dispatch import pick_rows
from kepo_kernels.rows import RowSettings

SLOWEST = 5.0  # seconds of a peer's first warm call, beyond which it is not timed
SHAPES = {
    "qwen3vl-2b-32b": (8192, 2048, 5120, 151936),
    "llama-8b": (8192, 4096, 4096, 128256),
    "small": (1024, 1024, 1024, 32768),
}
TINY = (64, 16, 24, 512)
# Seconds on an H200 at the first shape, and the one ratio.
H200 = {
    "kd_open": 46e-3,
    "kd_half": 24e-3,
    "joint": 45e-3,
    "joint_half": 34e-3,
    "grpo": 25e-3,
    "logprobs": 8.2e-3,
}
H200_KD_OVER_FLOOR = 1.15
PROVIDERS = {
    "kd_open": ("floor", "ours", "ours_bf16", "liger_triton", "liger", "trl", "eager", "compiled"),
    "kd_half": ("floor", "ours", "liger_triton"),
    "joint": ("floor", "ours", "liger", "eager"),
    "joint_half": ("ours",),
    "grpo": ("floor", "ours", "liger", "trl", "eager", "compiled"),
    "logprobs": ("floor", "ours", "trl", "eager"),
    "ce": ("floor", "ours", "liger", "cce", "torch_lce", "eager", "compiled"),
}


@dataclass(frozen=True)
class Clock:
    """Where to time, and what time is left."""

    device: torch.device
    left: Callable[[], float]

    def time(self, call: Callable[[], object]) -> Quantiles:
        """Seconds of a warm call."""
        if self.device.type != "cuda":
            return Quantiles.of([timed(call, self.device) for _ in range(3)])
        from triton.testing import do_bench

        found = do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8], return_mode="median")
        return Quantiles(*(milliseconds / 1e3 for milliseconds in found))


def ceilings(clock: Clock) -> Iterator[Row]:
    """What this device does at best: a large bf16 product, a large copy."""
    size = 8192 if clock.device.type == "cuda" else 128
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    seconds = clock.time(lambda: a @ b)
    note = f"{2 * size**3 / seconds.median / 1e12:.4g} TFLOP/s"
    yield plain_row("matmul", "torch", seconds, note, str(dtype).removeprefix("torch."))
    source = torch.empty(size, size * 8, device=clock.device)
    to = torch.empty_like(source)
    seconds = clock.time(lambda: to.copy_(source))
    yield with_bandwidth(plain_row("copy", "torch", seconds, "", "float32"), 2 * source.nbytes)


def row_kernels(clock: Clock) -> Iterator[Row]:
    """The row functions alone, with teacher and targets; fp32 and bf16 logits."""
    rows, vocab = (2048, 151936) if clock.device.type == "cuda" else (8, 512)
    for dtype in (torch.float32, torch.bfloat16):
        kernels = pick_rows("auto", clock.device, dtype)
        backend = kernels.__name__.partition(".")[2]

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=clock.device, dtype=dtype)

        targets = torch.randint(vocab, (rows,), device=clock.device)
        for teacher in (None, normal(rows, vocab)):
            logits, settings = normal(rows, vocab), RowSettings()
            table = kernels.row_forward(logits, targets, teacher, settings)
            back = normal(3, rows, dtype=torch.float32)
            sides = f"{rows} x {vocab}, {'no teacher' if teacher is None else 'JSD'}"
            name = str(dtype).removeprefix("torch.")
            # The least that must be moved: each matrix read once, dlogits written once.
            moved = logits.nbytes * (1 if teacher is None else 2)
            call = partial(kernels.row_forward, logits, targets, teacher, settings)
            row = plain_row("row_forward", backend, clock.time(call), sides, name)
            yield with_bandwidth(row, moved)
            # In place: the second call's logits are gradients, which take the same time.
            call = partial(kernels.row_backward_, logits, targets, teacher, table, back, settings)
            row = plain_row("row_backward", backend, clock.time(call), sides, name)
            yield with_bandwidth(row, moved + logits.nbytes)


def losses(clock: Clock, name: str) -> Iterator[Row]:
    """Every case and provider at one shape, the most important first."""
    sizes = SHAPES[name] if clock.device.type == "cuda" else TINY
    dtype = torch.bfloat16 if clock.device.type == "cuda" else torch.float32
    problem = Problem.make(Shape(name, *sizes, {}), dtype, clock.device)
    facts = dict(zip(("N", "H", "Ht", "V"), sizes, strict=True))
    facts |= {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
    floors: dict[str, Measurement] = {}
    mine = [(case, who) for case in PROVIDERS for who in ("floor", "ours", "ours_bf16")]
    theirs = [(case, who) for case in PROVIDERS for who in PROVIDERS[case]]
    for case, who in dict.fromkeys(mine + theirs):
        if who not in PROVIDERS[case]:
            continue
        try:
            if clock.left() < 10:
                raise NotComparable("left out: the time is over")
            result = measured(clock, problem, case, who)
        except NotComparable as reason:
            yield facts | {"case": case, "provider": who, "note": str(reason)}
            continue
        if who == "floor":
            floors[case] = result
        yield facts | targets(name, case, who, measured_row(case, who, result, floors.get(case)))


def measured(clock: Clock, problem: Problem, case: str, who: str) -> Measurement:
    """Median and quantiles as three `times`, so that ratios are formed as everywhere else."""
    try:
        call = provider(who)(problem, case)
        timed(call, clock.device)  # compiles
        result = watched(call, clock.device)
        if result.first > SLOWEST:
            raise NotComparable(f"too slow: {result.first:.1f} s a call")
        seconds = clock.time(call)
    except NotComparable:
        raise
    except Exception as error:
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotComparable(f"fails here: {words[:90]}") from error
    result.times = [seconds.p20, seconds.median, seconds.p80]
    return result


def provider(who: str) -> Callable[[Problem, str], Callable]:
    return {
        "floor": floor,
        "ours": own,
        "ours_bf16": own_bf16,
        "liger_triton": liger_triton,
        **PEERS,
    }[who]


def own(problem: Problem, case: str) -> Callable:
    if case != "joint_half":
        return ours(problem, case)
    p = problem
    policy = (p.hidden, p.lm_head, p.targets, p.advantages)
    teacher = (p.teacher_hidden, p.teacher_lm_head)
    also = {"gate": p.half, "old_logprobs": p.old_logprobs}
    return lambda: p.gradients(kepo_kernels.fused_kepo_loss(*policy, *teacher, **also))


def own_bf16(problem: Problem, case: str) -> Callable:
    """Gated KD with bf16 logits."""
    p = problem
    if p.hidden.dtype != torch.bfloat16:
        raise NotComparable("bf16 logits need bf16 inputs")
    side = (p.hidden, p.lm_head, p.teacher_hidden, p.teacher_lm_head)
    also = {"gate": p.gate(case), "logits_dtype": torch.bfloat16}
    return lambda: p.gradients(kepo_kernels.fused_gated_kd_loss(*side, **also))


def liger_triton(problem: Problem, case: str) -> Callable:
    """Liger's fused head and JSD, whose row kernels are Triton's."""
    if not problem.hidden.is_cuda:
        raise NotComparable("its Triton kernels need a GPU")
    fused = _imported("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(0.5)
    rows, p = _open_rows(problem, case), problem
    teacher = p.teacher_hidden.flatten(0, 1)[rows]

    def call() -> object:
        x = p.hidden.flatten(0, 1)[rows]
        return p.gradients(fused(x, p.lm_head, teacher, p.teacher_lm_head))

    return call


def targets(shape: str, case: str, who: str, row: Row) -> Row:
    """With the H200's target, and whether it was met, where it is one."""
    h200 = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    if not h200 or shape != next(iter(SHAPES)) or who != "ours" or case not in H200:
        return row
    met = row["seconds"] <= H200[case]
    if case == "kd_open":
        met &= row["x_floor"] <= H200_KD_OVER_FLOOR
        row["note"] = f"{row['note']} x floor <= {H200_KD_OVER_FLOOR} is part of it".strip()
    return row | {"target": H200[case], "met": "yes" if met else "no"}


def plain_row(case: str, who: str, seconds: Quantiles, note: str, dtype: str) -> Row:
    names = ("seconds", "seconds_p20", "seconds_p80")
    times = dict(zip(names, seconds, strict=True))
    return {"case": case, "provider": who, "dtype": dtype, **times, "note": note}


def with_bandwidth(row: Row, moved: int) -> Row:
    return row | {"gb_per_s": moved / row["seconds"] / 1e9}


TIMINGS: dict[str, Callable[[Clock], Iterator[Row]]] = {
    "ceilings": ceilings,
    "rows": row_kernels,
    **{f"losses_{name}": partial(losses, name=name) for name in SHAPES},
}
