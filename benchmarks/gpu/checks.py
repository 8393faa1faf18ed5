"""Correctness on a device: each check returns what it found, or raises AssertionError.

On a CPU the same code runs at tiny sizes. What a check finds on its way it prints, to the log.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import kepo_kernels
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.oracle import (
    LOSSES,
    Problem,
    evaluate,
    judge,
    make,
    make_large,
    oracle_of,
    poison,
    require,
    round_dlogits,
    upstream_of,
)
from kepo_kernels import reference
from kepo_kernels.compute import gemm

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
}
SECTIONS = {name: on_device(check) for name, check in CHECKS.items()}
