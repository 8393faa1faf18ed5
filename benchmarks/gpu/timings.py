"""Times on a device: its ceilings, our losses and their bare products, and the losses of others.

Each section yields tidy rows, one as soon as it is known. On a CPU the same code times each call
three times, at tiny sizes.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

import kepo_kernels
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.commands import nvidia_smi
from benchmarks.gpu.targets import FIRST_SHAPE, PUBLISHED_SHAPE
from benchmarks.losses.floor import floor
from benchmarks.losses.losses_of_ours import NotComparable, ours
from benchmarks.losses.measure import Measurement, Quantiles, timed, watched
from benchmarks.losses.peers import PEERS, _imported, _open_rows
from benchmarks.losses.problems import Problem, Shape
from benchmarks.losses.table import Row, measured_row
from benchmarks.stamp import installed, stamp
from kepo_kernels.rows.dispatch import IMPLS, unavailable

SLOWEST = 5.0  # seconds of a peer's first warm call, beyond which it is not timed
ENOUGH = 5.0  # seconds that must be left for one more call to be timed
SHAPES = {
    FIRST_SHAPE: (8192, 2048, 5120, 151936),
    PUBLISHED_SHAPE: (8192, 4096, 4096, 128256),
    "small": (1024, 1024, 1024, 32768),
}
TINY = (64, 16, 24, 512)
# By case, the most important first: kd_beta0 and kd_beta1 are the two KL divergences.
OURS = ("floor", "ours", "ours_bf16")
MINE = {
    "kd_open": OURS,
    "grpo": OURS[:2],
    "kd_half": OURS[:2],
    "joint": OURS[:2],
    "joint_half": OURS[:2],
    "logprobs_forward": OURS[:2],
    "logprobs": OURS[:2],
    "ce": OURS[:2],
    "kd_beta0": ("ours",),
    "kd_beta1": ("ours",),
}
FIRST = [(case, who) for case in ("kd_open", "grpo") for who in OURS[:2]]
ALL = [(case, who) for case, providers in MINE.items() for who in providers]
THEIRS = {
    "liger_triton": ("kd_open", "kd_half"),
    "liger": ("kd_open", "grpo", "joint", "ce"),
    "eager": ("kd_open", "grpo", "joint", "logprobs", "ce"),
    "trl": ("kd_open", "grpo", "logprobs"),
    "cce": ("ce",),
    "torch_lce": ("ce",),
    "compiled": ("kd_open", "grpo", "ce"),
}

Wanted = Iterable[tuple[str, str]]  # case and provider


def facts(clock: Clock) -> Iterator[Row]:
    """What every row is stamped with; to the log all that may explain a time."""
    package = Path(kepo_kernels.__file__).parent
    driver = nvidia_smi("driver_version")
    also = {"triton": installed("triton"), "driver": driver, "device": clock.kind}
    yield {"environment": stamp() | also}
    print(f"kepo_kernels from {package}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    print(", ".join(f"{name} {installed(name)}" for name in ("transformers", "peft", "numpy")))
    if clock.cuda:
        print(torch.cuda.get_device_properties(0), "free, total:", torch.cuda.mem_get_info())
        flags = torch.backends.cuda.matmul
        for name in ("allow_tf32", "allow_bf16_reduced_precision_reduction"):
            print(name, getattr(flags, name, "unknown"))
    for impl in IMPLS:
        print(f"{impl} rows: {unavailable(impl) or 'live'}")


def ceilings(clock: Clock) -> Iterator[Row]:
    """What this device does at best: a large bf16 product, a large copy."""
    size = 8192 if clock.cuda else 128
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    seconds = clock.time(lambda: a @ b)
    yield plain_row("matmul", "torch", seconds, flop=2 * size**3) | {"dtype": named(dtype)}
    source = torch.empty(size, size * 8, device=clock.device)
    to = torch.empty_like(source)
    seconds = clock.time(lambda: to.copy_(source))
    yield plain_row("copy", "torch", seconds, moved=2 * source.nbytes) | {"dtype": "float32"}


def losses(clock: Clock, shape: str, wanted: Wanted, rename: str = "") -> Iterator[Row]:
    """Cases and providers at one shape. One that fails is a row with the reason.

    `rename`: what "ours" is called in the rows.
    """
    sizes = SHAPES[shape] if clock.cuda else TINY
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    problem = Problem.make(Shape(shape, *sizes, {}), dtype, clock.device)
    known = dict(zip(("N", "H", "Ht", "V"), sizes, strict=True))
    known |= {"shape": shape, "dtype": named(dtype)}
    failed = []
    for case, who in wanted:
        called = rename if rename and who == "ours" else who
        row = known | {"case": case, "provider": called}
        try:
            if clock.left() < ENOUGH:
                raise NotComparable("left out: the time is over")
            result = measured(clock, problem, case, who)
        except NotComparable as reason:
            yield row | {"note": str(reason)}
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            yield row | {
                "note": f"fails here: {type(error).__name__}: {error}".splitlines()[0][:120]
            }
            failed += [f"{case} {who}"] * (who in OURS)
            recover(clock)
        else:
            yield row | measured_row(case, called, result, None)
    if failed:
        raise AssertionError(f"{', '.join(failed)} could not be timed")


def recover(clock: Clock) -> None:
    """Raises if the context is dead, so that nothing more is tried in it."""
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measured(clock: Clock, problem: Problem, case: str, who: str) -> Measurement:
    """Median and quantiles as three `times`, so that ratios are formed as everywhere else."""
    call = provider(who)(problem, case)
    timed(call, clock.device)  # compiles
    result = watched(call, clock.device)
    if result.first > SLOWEST:
        raise NotComparable(f"too slow: {result.first:.1f} s a call")
    seconds = clock.time(call)
    result.times = [seconds.p20, seconds.median, seconds.p80]
    return result


def provider(who: str) -> Callable[[Problem, str], Callable]:
    return {
        "floor": floor,
        "ours": own,
        "ours_bf16": partial(own, logits_dtype=torch.bfloat16),
        "liger_triton": liger_triton,
        **PEERS,
    }[who]


def own(problem: Problem, case: str, **engine: object) -> Callable:
    """As losses_of_ours.py, and the cases that are worth a time on a GPU only."""
    p = problem
    policy = (p.hidden, p.lm_head, p.targets, p.advantages)
    teacher = (p.teacher_hidden, p.teacher_lm_head)
    if engine and p.hidden.dtype != torch.bfloat16:
        raise NotComparable("bf16 logits need bf16 inputs")

    def kd(**settings: object) -> object:
        settings |= {"gate": p.gate(case)} | engine
        loss = kepo_kernels.fused_gated_kd_loss(p.hidden, p.lm_head, *teacher, **settings)
        return p.gradients(loss)

    def joint_half() -> object:
        also = {"gate": p.half, "old_logprobs": p.old_logprobs}
        return p.gradients(kepo_kernels.fused_kepo_loss(*policy, *teacher, **also))

    @torch.no_grad()
    def logprobs_forward() -> object:
        return kepo_kernels.fused_linear_logprobs(*policy[:3])

    calls = {
        "kd_beta0": partial(kd, beta=0.0),
        "kd_beta1": partial(kd, beta=1.0),
        "joint_half": joint_half,
        "logprobs_forward": logprobs_forward,
    }
    if engine:
        return kd
    return calls[case] if case in calls else ours(p, case)


def liger_triton(problem: Problem, case: str) -> Callable:
    """Liger's fused head and JSD, whose row kernels are Triton's."""
    if not problem.hidden.is_cuda:
        raise NotComparable("its Triton kernels need a GPU")
    fused = _imported("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(0.5)
    rows, p = _open_rows(problem, case), problem
    teacher = p.teacher_hidden.flatten(0, 1)[rows]

    def call() -> object:
        x = p.hidden.flatten(0, 1)[rows]
        return p.gradients(fused(x, p.lm_head, teacher, p.teacher_lm_head, None))  # no labels

    return call


def peers(clock: Clock, *names: str) -> Iterator[Row]:
    """Theirs, at the first shape first; our own of all shapes are known by then."""
    for shape in SHAPES:
        yield from losses(clock, shape, [(case, who) for who in names for case in THEIRS[who]])


def baseline(clock: Clock) -> Iterator[Row]:
    """The package of another checkout: this process was started with it before ours."""
    package = Path(kepo_kernels.__file__).resolve()
    if package.parents[1] == Path(__file__).resolve().parents[2]:
        raise AssertionError(f"this is no other checkout: {package}")
    mine = [(case, who) for case, who in ALL if who == "ours" and case != "ce"]
    for row in losses(clock, FIRST_SHAPE, mine, rename="baseline"):
        yield row | {"note": ", ".join(filter(None, (row.get("note"), package.parents[1].name)))}


def plain_row(
    case: str, who: str, seconds: Quantiles, note: str = "", moved: float = 0, flop: float = 0
) -> Row:
    """A time; `moved`: bytes, `flop`: operations of the call."""
    names = ("seconds", "seconds_p20", "seconds_p80")
    row = {"case": case, "provider": who, **dict(zip(names, seconds, strict=True)), "note": note}
    if moved:
        row["gb_per_s"] = moved / seconds.median / 1e9
    if flop:
        row["tflop_per_s"] = flop / seconds.median / 1e12
    return row


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SECTIONS: dict[str, Callable[[Clock], Iterator[Row]]] = {
    "facts": facts,
    "ceilings": ceilings,
    "losses_first": partial(losses, shape=FIRST_SHAPE, wanted=FIRST),
    "losses_more": partial(
        losses, shape=FIRST_SHAPE, wanted=[pair for pair in ALL if pair not in FIRST]
    ),
    **{
        f"losses_{shape}": partial(losses, shape=shape, wanted=ALL)
        for shape in SHAPES
        if shape != FIRST_SHAPE
    },
    "baseline": baseline,
    "peers_liger": lambda clock: peers(clock, "liger_triton", "liger"),
    "peers_eager": lambda clock: peers(clock, "eager"),
    "peers_others": lambda clock: peers(clock, "trl", "cce", "torch_lce"),
    "peers_compiled": lambda clock: peers(clock, "compiled"),
}
