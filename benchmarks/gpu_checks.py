"""Correctness on a device: each check returns what it found, or raises AssertionError or Skipped.

On a CPU the same code runs at tiny sizes, but for what only CUDA has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
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
)
from torch import Tensor

import kepo_kernels
from kepo_kernels import engine, reference

REPEATS = 100
SAMPLED = 64


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


def correctness(dtype: torch.dtype) -> Callable[[torch.device], str]:
    """Every loss, whole gradients, at medium sizes: plain, capped, with bias, peaked."""

    def check(device: torch.device) -> str:
        sizes = (4, 64, 256, 384, 8191) if device.type == "cuda" else (4, 16, 64, 96, 509)
        worst = 0.0
        variants = {
            "plain": {},
            "softcap": {"softcap": 3.0},
            "bias": {"bias": True},
            "peaked": {"std": 12.0, "exact": True},
        }
        for variant, settings in variants.items():
            problem = make(device, sizes, dtype, **settings)
            for name, loss in LOSSES.items():
                oracle, rounded = oracle_of(loss, problem)
                found = evaluate(loss, problem, True, logits_dtype=torch.float32)
                names = ("loss", "dhidden", "dlm_head", "dbias")
                for part, *numbers in zip(names, found, oracle, rounded, strict=False):
                    worst = max(worst, judge(f"{name}, {variant}, {part}", *numbers))
        return f"{len(LOSSES) * len(variants)} calls, error at most {worst:.2f} of the bound"

    return check


def sampled(device: torch.device) -> str:
    """A real vocabulary: numbers and gradients of sampled rows, and sampled rows of the head."""
    sizes = (16, 256, 1024, 2048, 151936) if device.type == "cuda" else (4, 32, 16, 24, 1009)
    p = replace(make_large(device, sizes), gate=torch.ones(sizes[0], device=device))
    rows = torch.randperm(p.mask.numel(), device=device)[:SAMPLED]
    small = lambda x: x.detach().flatten(0, 1)[rows].double()  # noqa: E731
    x, w = small(p.hidden), p.lm_head.detach().double()
    logits = (x @ w.T).requires_grad_()
    teacher = small(p.teacher_hidden) @ p.teacher_lm_head.double().T
    numbers = reference.token_divergence(logits, teacher, 0.5)
    (dlogits,) = torch.autograd.grad(numbers.sum(), logits)
    rounded = round_dlogits(dlogits, p.hidden)
    settings = {"reduction": "sum", "return_stats": True, "logits_dtype": torch.float32}

    def call(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        poison(device)
        side = (p.hidden, p.lm_head, p.teacher_hidden, p.teacher_lm_head)
        loss, stats = kepo_kernels.fused_gated_kd_loss(*side, completion_mask=mask, **settings)
        return stats.divergence, *torch.autograd.grad(loss, (p.hidden, p.lm_head))

    found, dhidden, _ = call(torch.ones_like(p.mask))
    worst = judge("divergence", found.flatten()[rows], numbers.detach())
    worst = max(worst, judge("dhidden", dhidden.flatten(0, 1)[rows], dlogits @ w, rounded @ w))
    only = torch.zeros_like(p.mask).flatten()
    only[rows] = True
    columns = torch.randperm(len(w), device=device)[: 16 * SAMPLED]
    dhead = call(only.view_as(p.mask))[2][columns]
    dw = [(g.T @ x)[columns] for g in (dlogits, rounded)]
    worst = max(worst, judge("dlm_head", dhead, *dw))
    return f"V={sizes[-1]}: {SAMPLED} rows, error at most {worst:.2f} of the bound"


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
    kepo(p, True).backward()  # compiles
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
    p = make_large(device, (8, 256, 1024, 1024, 32768))
    side = (p.hidden, p.lm_head, p.teacher_hidden, p.teacher_lm_head)
    shares = []
    # The accumulators of both gradients, which plan() does not count as workspace either.
    accumulators = sum(4 * x.numel() for x in p.leaves)
    rows = p.mask.numel()
    for mib in (64, 256, 1024):
        budget = mib << 20
        sizes = {"teacher_rows": rows, "dtype": torch.bfloat16, "device": device}
        planned = engine.plan(rows, 1024, 32768, **sizes, workspace_bytes=budget).workspace_bytes
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
        needs_gpu(device)
        vocab, rows, width = 151936, 16384, 64
        free = torch.cuda.mem_get_info(device)[0]
        needed = rows * vocab * (2 if chunked else 10)
        if not chunked and free < needed:
            raise Skipped(f"{free >> 30} GiB are free, {needed >> 30} GiB needed")
        p = make_large(device, (16, rows // 16, width, width, vocab))
        size = 2048 if chunked else rows
        call = {"chunk_rows": size, "logits_dtype": torch.float32}
        found = kepo_kernels.fused_linear_logprobs(p.hidden, p.lm_head, p.targets, **call)
        (dhidden,) = torch.autograd.grad(found.sum(), p.hidden)
        ends = torch.tensor([0, 14133, 14134, 14135, rows - 1], device=device)
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


def sanitizer(tool: str) -> Callable[[torch.device], str]:
    """compute-sanitizer over this program's hidden step, small shapes."""

    def check(device: torch.device) -> str:
        needs_gpu(device)
        if not shutil.which("compute-sanitizer"):
            raise Skipped("compute-sanitizer is not on PATH")
        suite = Path(__file__).with_name("gpu_suite.py")
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, str(suite), "--sanitized"]
        # Each tensor an allocation of its own, so that its end is the end of what may be touched.
        alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=alone)
        except subprocess.TimeoutExpired as late:
            raise Skipped("took more than 90 s") from late
        words = (done.stdout + done.stderr).strip().splitlines()
        require(done.returncode == 0, f"exit {done.returncode}: {' | '.join(words[-4:])}")
        return words[-1] if words else "clean"

    return check


def sanitized_step() -> None:
    """What runs under compute-sanitizer."""
    p = make(torch.device("cuda"), (2, 4, 32, 48, 3001), torch.bfloat16)
    for loss in LOSSES.values():
        torch.autograd.grad(loss(p, True), p.leaves)
    torch.cuda.synchronize()


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "correct_fp32": correctness(torch.float32),
    "correct_bf16": correctness(torch.bfloat16),
    "correct_fp16": correctness(torch.float16),
    "sampled_rows": sampled,
    "repeatable": repeatable,
    "no_sync": no_sync,
    "cuda_graph": graph,
    "workspace": workspace,
    "one_chunk_beyond_int32": beyond_int32(chunked=False),
    "chunks_beyond_int32": beyond_int32(chunked=True),
    "compile": compiled,
    "two_streams": streams,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
}
