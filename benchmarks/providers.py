"""The same losses by different hands: ours, torch eager, Liger's chunked ones, the bare GEMMs.

A provider is a function of a `Problem` and a case name that returns a closure running forward and
backward once, or None when it does not have that case.

    kd_open   gated distillation, every sequence open
    kd_half   the same, every other sequence closed
    grpo      the clipped objective
    joint     grpo + kd_half at once
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from kepo_kernels import fused_gated_kd_loss, fused_grpo_loss, fused_kepo_loss, gemm, reference
from kepo_kernels.problem import DEFAULT_WORKSPACE

CASES = ("kd_open", "kd_half", "grpo", "joint")
TOKENS = 16  # of a sequence
Call = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """B sequences of `TOKENS` tokens; the leaves require gradient."""

    hidden: Tensor
    lm_head: Tensor
    targets: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    teacher_hidden: Tensor
    teacher_lm_head: Tensor
    half: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        """Random states and heads scaled so that logits have a standard deviation of about 3."""
        n, h, teacher_h, vocab = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)

        tokens = min(TOKENS, n)
        batch = n // tokens
        return cls(
            hidden=normal(batch, tokens, h).requires_grad_(),
            lm_head=normal(vocab, h, scale=3 * h**-0.5).requires_grad_(),
            targets=torch.randint(vocab, (batch, tokens), generator=generator, device=device),
            advantages=torch.randn(batch, generator=generator, device=device),
            old_logprobs=torch.full((batch, tokens), -11.0, device=device),
            teacher_hidden=normal(batch, tokens, teacher_h),
            teacher_lm_head=normal(vocab, teacher_h, scale=3 * teacher_h**-0.5),
            half=torch.arange(batch, device=device) % 2 == 0,
        )

    def first_rows(self, rows: int) -> Problem:
        """The same problem on its first sequences only."""
        keep = max(1, rows // self.hidden.shape[1])
        return Problem(
            self.hidden.detach()[:keep].requires_grad_(),
            self.lm_head,
            self.targets[:keep],
            self.advantages[:keep],
            self.old_logprobs[:keep],
            self.teacher_hidden[:keep],
            self.teacher_lm_head,
            self.half[:keep],
        )

    @property
    def rows(self) -> int:
        return self.targets.numel()

    def backward(self, loss: Tensor) -> None:
        """Gradients of both leaves, freed at once: each call starts from nothing."""
        torch.autograd.grad(loss, (self.hidden, self.lm_head))


def gate_of(problem: Problem, case: str) -> Tensor:
    return problem.half if case != "kd_open" else torch.ones_like(problem.half)


def ours(problem: Problem, case: str) -> Call:
    return _call(problem, case, fused_gated_kd_loss, fused_grpo_loss, fused_kepo_loss)


def eager(problem: Problem, case: str) -> Call:
    """The whole-matrix formulas in the inputs' own dtype, as one writes them in a trainer."""
    return _call(problem, case, reference.gated_kd_loss, reference.grpo_loss, reference.kepo_loss)


def _call(problem: Problem, case: str, kd: Callable, grpo: Callable, kepo: Callable) -> Call:
    p, gate = problem, gate_of(problem, case)
    policy = (p.hidden, p.lm_head, p.targets, p.advantages)
    teacher = (p.teacher_hidden, p.teacher_lm_head)
    if case == "grpo":
        return lambda: p.backward(grpo(*policy, old_logprobs=p.old_logprobs))
    if case == "joint":
        return lambda: p.backward(kepo(*policy, *teacher, gate=gate, old_logprobs=p.old_logprobs))
    return lambda: p.backward(kd(p.hidden, p.lm_head, *teacher, gate=gate))


def liger(problem: Problem, case: str) -> Call | None:
    """Liger's chunked JSD and GRPO, uncompiled. It has no joint loss; a closed gate is a masked
    label."""
    if find_spec("liger_kernel") is None or case == "joint":
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss

    p = problem
    if case == "grpo":
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, compiled=False, loss_type="grpo"
        )
        mask = torch.ones_like(p.targets)
        return lambda: p.backward(
            loss(
                p.hidden,
                p.lm_head,
                p.targets,
                mask,
                p.advantages,
                old_per_token_logps=p.old_logprobs,
            )[0]
        )
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False
    )
    labels = torch.where(gate_of(p, case)[:, None], p.targets, -100).flatten()
    teacher = p.teacher_hidden.flatten(0, 1)
    return lambda: p.backward(
        loss(p.hidden.flatten(0, 1), p.lm_head, teacher, p.teacher_lm_head, labels)
    )


def floor(problem: Problem, case: str) -> Call:
    """The matrix products of our loss and nothing else: same chunks, same calls, same inputs.

    Where the processor multiplies bf16 slowly they are fp32 products of upcast strips; plain bf16
    `mm`, as `eager` and `liger` use it, would make a floor many times higher.
    """
    p = problem
    device, dtype = p.hidden.device, p.hidden.dtype
    logits_dtype = gemm.default_logits_dtype(dtype, device)
    x, y = p.hidden.detach().flatten(0, 1), p.teacher_hidden.flatten(0, 1)
    w, teacher_w = p.lm_head.detach(), p.teacher_lm_head
    opened = gate_of(p, case)[:, None].expand(p.targets.shape).flatten()
    with_teacher = [] if case == "grpo" else _chunks(opened, 2 * len(w), logits_dtype)
    without = {
        "grpo": _chunks(torch.ones_like(opened), len(w), logits_dtype),
        "joint": _chunks(~opened, len(w), logits_dtype),
    }.get(case, [])

    def run() -> None:
        dw = torch.zeros(w.shape, dtype=gemm.gradient_dtype(dtype), device=device)
        longest = max(map(len, with_teacher + without))
        student, teacher = (
            torch.empty(longest, len(w), dtype=logits_dtype, device=device) for _ in range(2)
        )
        for rows, has_teacher in [(r, True) for r in with_teacher] + [(r, False) for r in without]:
            chunk, logits = x[rows], student[: len(rows)]
            gemm.project_(logits, chunk, w, None)
            if has_teacher:
                gemm.project_(teacher[: len(rows)], y[rows], teacher_w, None)
            gemm.hidden_gradient(logits, w)
            gemm.accumulate_head_(dw, logits, chunk)

    return run


def _chunks(active: Tensor, columns: int, dtype: torch.dtype) -> list[Tensor]:
    rows = active.nonzero().squeeze(-1)
    size = DEFAULT_WORKSPACE[active.device.type] // (columns * dtype.itemsize)
    return list(rows.tensor_split(-(-len(rows) // size))) if len(rows) else []


PROVIDERS: dict[str, Callable[[Problem, str], Call | None]] = {
    "floor": floor,
    "ours": ours,
    "liger": liger,
    "eager": eager,
}
