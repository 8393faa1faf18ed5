"""How the losses run on a device: to the same bits, without waits, captured, within their memory.

Each check returns what it found, or raises AssertionError or Skipped. On a CPU the same code runs
at tiny sizes, but for what only CUDA has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import kepo_kernels
from benchmarks.gpu.checks import on_device
from benchmarks.gpu.clock import Skipped
from benchmarks.gpu.oracle import (
    LOSSES,
    Problem,
    evaluate,
    grpo,
    judge,
    kd,
    kepo,
    make_large,
    medium,
    require,
    round_dlogits,
)
from kepo_kernels import reference
from kepo_kernels.compute.chunks import chunking

REPEATS = 100


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
    # The accumulators of both gradients, which chunking() does not count as workspace either.
    accumulators = sum(4 * x.numel() for x in p.leaves)
    rows = p.mask.numel()
    for mib in (64, 256, 1024):
        budget = mib << 20
        sizes = {"teacher_rows": rows, "dtype": torch.bfloat16, "device": device}
        counted = chunking(rows, width, vocab, **sizes, workspace_bytes=budget).workspace_bytes
        kepo_kernels.fused_gated_kd_loss(*side, workspace_bytes=budget)  # kernels, cuBLAS
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kepo_kernels.fused_gated_kd_loss(*side, workspace_bytes=budget)
        used = torch.cuda.max_memory_allocated() - before - accumulators
        require(used <= budget, f"{used} bytes above the gradients, {budget} were granted")
        shares.append(f"{used / 2**20:.0f} of {mib} MiB ({counted / 2**20:.0f} counted)")
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


CHECKS: dict[str, Callable[[torch.device], str]] = {
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
