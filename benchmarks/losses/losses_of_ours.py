"""The package's own calls of each case, through its public functions only.

kd_open    gated distillation (JSD, beta 0.5), every sequence open
kd_half    the same, every other sequence closed
grpo       the clipped objective
joint      grpo and kd_open at once
two_calls  the same two losses, one call after the other
kd_tol     kd_open with grad_tol
grpo_tol   grpo with grad_tol
logprobs   log-probability per token, with an upstream gradient each
ce         cross-entropy
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import kepo_kernels
from benchmarks.losses.problems import Problem

CASES = {
    "kd_open": "gated KD, all open",
    "kd_half": "gated KD, half open",
    "grpo": "GRPO",
    "joint": "KEPO: both at once",
    "two_calls": "GRPO, then gated KD",
    "kd_tol": "KD with grad_tol",
    "grpo_tol": "GRPO with grad_tol",
    "logprobs": "log-probabilities",
    "ce": "cross-entropy",
}

Gradients = tuple[Tensor, Tensor]  # of hidden and lm_head
GradientCall = Callable[[], Gradients]


class NotComparable(Exception):
    """A provider has no such case here; the message says why."""


def ours(problem: Problem, case: str, grad_tol: float = 5e-4) -> GradientCall:
    """A call that runs forward and backward once and returns the gradients."""
    p = problem
    policy = (p.hidden, p.lm_head, p.targets, p.advantages)
    teacher = (p.teacher_hidden, p.teacher_lm_head)
    gate = p.gate(case)

    def kd(**engine: object) -> Gradients:
        return p.gradients(
            kepo_kernels.fused_gated_kd_loss(p.hidden, p.lm_head, *teacher, gate=gate, **engine)
        )

    def grpo(**engine: object) -> Gradients:
        return p.gradients(
            kepo_kernels.fused_grpo_loss(*policy, old_logprobs=p.old_logprobs, **engine)
        )

    def joint() -> Gradients:
        return p.gradients(
            kepo_kernels.fused_kepo_loss(*policy, *teacher, gate=gate, old_logprobs=p.old_logprobs)
        )

    def two_calls() -> Gradients:
        return tuple(a.add_(b) for a, b in zip(grpo(), kd(), strict=True))

    def logprobs() -> Gradients:
        found = kepo_kernels.fused_linear_logprobs(p.hidden, p.lm_head, p.targets)
        return p.gradients((found * p.upstream).sum())

    def ce() -> Gradients:
        return p.gradients(
            kepo_kernels.fused_linear_loss(
                p.hidden,
                p.lm_head,
                p.targets,
                lambda stats, rows: -stats.logprobs,
                reduction="token_mean",
            )
        )

    def tolerant(call: Callable[..., Gradients]) -> GradientCall:
        return lambda: call(grad_tol=grad_tol)

    return {
        "kd_open": kd,
        "kd_half": kd,
        "grpo": grpo,
        "joint": joint,
        "two_calls": two_calls,
        "kd_tol": tolerant(kd),
        "grpo_tol": tolerant(grpo),
        "logprobs": logprobs,
        "ce": ce,
    }[case]
