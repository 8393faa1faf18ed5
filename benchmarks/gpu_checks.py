"""Correctness on a device: each check returns what it found, or raises AssertionError or Skipped.

On a CPU the same code runs at tiny sizes, but for what only CUDA has.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from gpu_clock import Clock, Skipped
from gpu_problems import (
    LOSSES,
    Problem,
    evaluate,
    grpo,
    judge,
    kd,
    kepo,
    make,
    make_large,
    medium,
    oracle_of,
    poison,
    require,
    round_dlogits,
    upstream_of,
)
from torch import Tensor

import kepo_kernels
from kepo_kernels import engine, gemm, reference

REPEATS = 100
SAMPLED = 64


# Of fp16's gradients from fp32's, as a share of their size: dlogits and the result are each rounded
# by at most 2^-11 of their size, and the product may make nine times as much of the first.
RANGE_ERROR = 10 * 2.0**-11
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "peaked": {"std": 12.0, "exact": True},
    "softcap": {"softcap": 3.0},
}


class Errors:
    """The worst share of its bound, and what exceeded it: one wrong number hides no other."""

    def __init__(self) -> None:
        self.worst, self.failed = 0.0, []

    def judge(self, name: str, *numbers: Tensor) -> None:
        try:
            share = judge(name, *numbers)
        except AssertionError as error:
            self.failed.append(str(error))
            print("  FAIL", error)
        else:
            self.worst = max(self.worst, share)
            print(f"  {name}: error {share:.3f} of the bound")

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What is raised in it is one failure, unless the device's context is dead after it."""
        try:
            yield
        except Exception as error:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            traceback.print_exc(file=sys.stdout)
            self.failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])

    def verdict(self, calls: int) -> str:
        if self.failed:
            raise AssertionError(f"{len(self.failed)} of {calls} calls' numbers: {self.failed[0]}")
        return f"{calls} calls, error at most {self.worst:.2f} of the bound"


def correctness(dtype: torch.dtype, *variants: str) -> Callable[[torch.device], str]:
    """Every loss, whole gradients, at medium sizes."""

    def check(device: torch.device) -> str:
        sizes = (4, 64, 256, 384, 8191) if device.type == "cuda" else (4, 16, 64, 96, 509)
        errors = Errors()
        for variant in variants:
            problem = make(device, sizes, dtype, **VARIANTS[variant])
            for name, loss in LOSSES.items():
                with errors.of(f"{name}, {variant}"):
                    compare(f"{name}, {variant}", loss, problem, errors)
        return errors.verdict(len(LOSSES) * len(variants))

    return check


def compare(name: str, loss: Callable[..., Tensor], problem: Problem, errors: Errors) -> None:
    """A loss and its gradients with the oracle's."""
    (value, *exact), (_, *rounded) = oracle_of(loss, problem)
    factor = upstream_of(exact, problem.hidden.dtype)
    found = evaluate(loss, problem, True, factor, logits_dtype=torch.float32)
    errors.judge(f"{name}, loss", found[0], value)
    parts = zip(("dhidden", "dlm_head", "dbias"), found[1:], exact, rounded, strict=False)
    for part, gradient, oracle, of_rounding in parts:
        errors.judge(f"{name}, {part}", gradient, oracle * factor, of_rounding * factor)


def fp16_range(device: torch.device) -> str:
    """fp16's gradients are those of fp32 where dlogits lie far below its smallest number, 6e-8.

    A mean over the tokens of a batch makes them about 1 / (N V). On a CPU, whose problem is small,
    and which keeps dlogits in fp32, the weights make them as small as that.
    """
    cuda = device.type == "cuda"
    sizes = (16, 512, 64, 96, 32768) if cuda else (4, 16, 16, 24, 512)
    narrow = replace(make_large(device, sizes), old_logprobs=None).to(torch.float16)
    wide = narrow.to(torch.float32)
    weight = 1.0 if cuda else 2.0**-14
    weights = torch.full(narrow.mask.shape, weight / narrow.mask.numel(), device=device)
    found_errors = []
    for name in ("kd", "grpo"):
        _, *exact = evaluate(LOSSES[name], wide, True, weights=weights)
        factor = upstream_of(exact, torch.float16)
        _, *found = evaluate(LOSSES[name], narrow, True, factor, weights=weights)
        for part, gradient, oracle in zip(("dhidden", "dlm_head"), found, exact, strict=True):
            oracle = oracle.double()
            error = (gradient.double() / factor - oracle).norm() / oracle.norm()
            print(f"  {name}, {part}: relative error {error:.2e}")
            found_errors.append((float(error), f"{name}, {part}"))
    worst, where = max(found_errors)
    right = all(error <= RANGE_ERROR for error, _ in found_errors)  # false for NaN
    require(right, f"{where}: relative error {worst:.2e} exceeds {RANGE_ERROR:.1e}")
    return f"KD and GRPO, relative error at most {worst:.1e}"


def sampled(device: torch.device) -> str:
    """A real vocabulary: numbers and gradients of sampled rows, and sampled rows of the head.

    From the device's own fp32 logits, so that what the row kernels make of them is judged. The
    products' own error, which tensor cores may cut off rather than round, is printed.
    """
    sizes = (16, 256, 1024, 2048, 151936) if device.type == "cuda" else (4, 32, 16, 24, 1009)
    p = replace(make_large(device, sizes), gate=torch.ones(sizes[0], device=device))
    rows = torch.randperm(p.mask.numel(), device=device)[:SAMPLED]
    x, w = p.hidden.detach().flatten(0, 1)[rows], p.lm_head.detach()
    logits = device_logits("student", x, w).requires_grad_()
    teacher_x = p.teacher_hidden.flatten(0, 1)[rows]
    teacher = device_logits("teacher", teacher_x, p.teacher_lm_head)
    x, w = x.double(), w.double()
    numbers = reference.token_divergence(logits, teacher, 0.5)
    (dlogits,) = torch.autograd.grad(numbers.sum(), logits)
    rounded = round_dlogits(dlogits, p.hidden)
    settings = {"reduction": "sum", "return_stats": True, "logits_dtype": torch.float32}

    def call(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        poison(device)
        side = (p.hidden, p.lm_head, p.teacher_hidden, p.teacher_lm_head)
        loss, stats = kepo_kernels.fused_gated_kd_loss(*side, completion_mask=mask, **settings)
        return stats.divergence, *torch.autograd.grad(loss, (p.hidden, p.lm_head))

    errors = Errors()
    found, dhidden, _ = call(torch.ones_like(p.mask))
    errors.judge("divergence", found.flatten()[rows], numbers.detach())
    errors.judge("dhidden", dhidden.flatten(0, 1)[rows], dlogits @ w, rounded @ w)
    only = torch.zeros_like(p.mask).flatten()
    only[rows] = True
    columns = torch.randperm(len(w), device=device)[: 16 * SAMPLED]
    dhead = call(only.view_as(p.mask))[2][columns]
    errors.judge("dlm_head", dhead, *((g.T @ x)[columns] for g in (dlogits, rounded)))
    return f"V={sizes[-1]}, {SAMPLED} rows: {errors.verdict(3)}"


def device_logits(name: str, x: Tensor, w: Tensor) -> Tensor:
    """x @ w^T as the losses form it, in fp32 and then fp64; prints how far from exact that is."""
    logits = torch.empty(len(x), len(w), device=x.device)
    gemm.project_(logits, x, w)
    exact, logits = x.double() @ w.double().T, logits.double()
    shrunk = float((logits * exact).sum() / exact.square().sum()) - 1
    error = float((logits - exact).norm() / exact.norm())
    print(f"  the {name}'s product: relative error {error:.1e}, scaled by 1 {shrunk:+.1e}")
    return logits


def require_same_bits(first: tuple[Tensor, ...], then: tuple[Tensor, ...], what: str) -> None:
    for a, b in zip(first, then, strict=True):
        require(torch.equal(a, b), f"{what} differs by {(a.double() - b.double()).abs().max():.1e}")


def repeatable(device: torch.device) -> str:
    p, repeats = medium(device), REPEATS if device.type == "cuda" else 5
    for name in ("kd", "grpo", "kepo", "logprobs"):
        first = evaluate(LOSSES[name], p, True)
        for call in range(1, repeats):
            require_same_bits(first, evaluate(LOSSES[name], p, True), f"{name}, call {call}")
    return f"{repeats} calls of each loss, bit for bit"


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a GPU")


def no_sync(device: torch.device) -> str:
    """With gate and mask on the CPU nothing waits for the device."""
    needs_gpu(device)
    p = medium(device)
    p = replace(p, gate=p.gate.cpu(), mask=p.mask.cpu())
    for loss in (kd, grpo, kepo):
        loss(p, True).backward()  # compiles
    torch.cuda.synchronize()
    with sync_is_an_error():
        for loss in (kd, grpo, kepo):
            loss(p, True).backward()
    return "forward and backward of three losses"


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def graph(device: torch.device) -> str:
    """Captured and replayed, with gate and mask on the CPU."""
    needs_gpu(device)
    p = medium(device)
    p = replace(p, gate=p.gate.cpu(), mask=p.mask.cpu())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = run(p)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = run(p)
    for _ in range(3):
        for x in found:
            x.fill_(torch.nan)
        captured.replay()
        torch.cuda.synchronize()
        require_same_bits(expected, found, "the replay")
    return "three replays equal eager, bit for bit"


def run(p: Problem) -> tuple[Tensor, ...]:
    loss = kepo(p, True)
    return loss.detach(), *torch.autograd.grad(loss, p.leaves)


def workspace(device: torch.device) -> str:
    needs_gpu(device)
    width, vocab = (1024, 32768) if device.type == "cuda" else (16, 512)
    p = make_large(device, (8, 256, width, width, vocab))
    side = (p.hidden, p.lm_head, p.teacher_hidden, p.teacher_lm_head)
    shares = []
    # The accumulators of both gradients, which plan() does not count as workspace either.
    accumulators = sum(4 * x.numel() for x in p.leaves)
    rows = p.mask.numel()
    for mib in (64, 256, 1024):
        budget = mib << 20
        sizes = {"teacher_rows": rows, "dtype": torch.bfloat16, "device": device}
        planned = engine.plan(rows, width, vocab, **sizes, workspace_bytes=budget).workspace_bytes
        kepo_kernels.fused_gated_kd_loss(*side, workspace_bytes=budget)  # kernels, cuBLAS
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kepo_kernels.fused_gated_kd_loss(*side, workspace_bytes=budget)
        used = torch.cuda.max_memory_allocated() - before - accumulators
        require(used <= budget, f"{used} bytes above the gradients, {budget} were granted")
        shares.append(f"{used / 2**20:.0f} of {mib} MiB ({planned / 2**20:.0f} planned)")
    return ", ".join(shares)


def beyond_int32(chunked: bool) -> Callable[[torch.device], str]:
    """N V > 2^31 logits, in one chunk or over several; rows at both ends are looked at."""

    def check(device: torch.device) -> str:
        cuda = device.type == "cuda"
        vocab, rows, width = (151936, 16384, 64) if cuda else (509, 64, 8)
        free = torch.cuda.mem_get_info(device)[0] if cuda else sys.maxsize
        needed = rows * vocab * (2 if chunked else 10)
        if not chunked and free < needed:
            raise Skipped(f"{free >> 30} GiB are free, {needed >> 30} GiB needed")
        p = make_large(device, (16, rows // 16, width, width, vocab))
        size = rows // 8 if chunked else rows
        call = {"chunk_rows": size, "logits_dtype": torch.float32}
        found = kepo_kernels.fused_linear_logprobs(p.hidden, p.lm_head, p.targets, **call)
        (dhidden,) = torch.autograd.grad(found.sum(), p.hidden)
        edge = 2**31 // vocab if cuda else rows // 2  # the row in which the 2^31st element stands
        ends = torch.tensor([0, edge - 1, edge, edge + 1, rows - 1], device=device)
        x, w = p.hidden.detach().flatten(0, 1)[ends].double(), p.lm_head.detach().double()
        logits = (x @ w.T).requires_grad_()
        oracle = reference.token_logprob(logits, p.targets.flatten()[ends])
        (dlogits,) = torch.autograd.grad(oracle.sum(), logits)
        dx = [g @ w for g in (dlogits, round_dlogits(dlogits, p.hidden))]
        judge("logprobs", found.detach().flatten()[ends], oracle.detach())
        worst = judge("dhidden", dhidden.flatten(0, 1)[ends], *dx)
        return f"{rows} x {vocab} in chunks of {size}, error {worst:.2f} of the bound"

    return check


def compiled(device: torch.device) -> str:
    """torch.compile(fullgraph=True) of a small model that ends in the loss."""
    p = medium(device)
    layer = torch.nn.Linear(p.hidden.shape[-1], p.hidden.shape[-1], device=device).bfloat16()

    def model(x: Tensor) -> Tensor:
        return kepo(replace_hidden(p, layer(x)), True)

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        loss = function(p.hidden)
        return loss.detach(), *torch.autograd.grad(loss, (p.lm_head, layer.weight))

    backend = "inductor" if device.type == "cuda" else "aot_eager"  # no C++ compiler is assumed
    found = gradients(torch.compile(model, fullgraph=True, backend=backend))
    for name, a, b in zip(("loss", "dlm_head", "dweight"), found, gradients(model), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        require(error <= 1e-2, f"{name} differs from eager's by {error:.1e}")
    return f"fullgraph, {backend}"


def replace_hidden(p: Problem, hidden: Tensor) -> Problem:
    """As dataclasses.replace, which torch.compile does not trace in every version."""
    names = Problem.__dataclass_fields__
    return Problem(**{name: hidden if name == "hidden" else getattr(p, name) for name in names})


def streams(device: torch.device) -> str:
    needs_gpu(device)
    p = medium(device)
    expected = run(p)
    pair = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in pair:
            with torch.cuda.stream(stream):
                found.append(run(p))
    torch.cuda.synchronize()
    for results in found:
        require_same_bits(expected, results, "a call beside another stream's")
    return "10 calls on each of two"


def on_device(check: Callable[[torch.device], str]) -> Callable[[Clock], str]:
    return lambda clock: check(clock.device)


CHECKS: dict[str, Callable[[torch.device], str]] = {
    # In the capped kernels, which take longest to compile, in a section of its own.
    "correct_bf16": correctness(torch.bfloat16, "plain", "bias", "peaked"),
    "correct_softcap": correctness(torch.bfloat16, "softcap"),
    "correct_fp16": correctness(torch.float16, "plain"),
    "correct_fp32": correctness(torch.float32, "plain"),
    "fp16_range": fp16_range,
    "sampled_rows": sampled,
    "repeatable": repeatable,
    "no_sync": no_sync,
    "cuda_graph": graph,
    "workspace": workspace,
    "one_chunk_beyond_int32": beyond_int32(chunked=False),
    "chunks_beyond_int32": beyond_int32(chunked=True),
    "compile": compiled,
    "two_streams": streams,
}
SECTIONS = {name: on_device(check) for name, check in CHECKS.items()}
