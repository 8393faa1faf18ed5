"""The two losses of a training step as plain PyTorch on whole matrices, for bench_step.py.

They stand in for `fused_kepo_loss` and `fused_grpo_loss` in `kepo.step`, and are what a careful
user writes there: logits of the tokens that carry loss only, the teacher's without gradient and of
the open sequences only, one log_softmax for both terms, one shift for both weights of the mixture,
each KL summed before it is weighted, no name that keeps a matrix alive for longer than autograd
does, entropy (a metric) in slices. At beta 0.5 the divergence, forward and backward, then holds 8
matrices at its peak; the usual formula (TRL's, and `jsd` in peers.py) holds 9 or more, and
`kepo_kernels/reference.py`, whose guards against -inf each copy a matrix, more again.

For the settings of a default run; any other is refused.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from kepo_kernels import TokenStats

SLICE = 128  # tokens whose entropy is taken at once
DEFAULTS = {
    "old_logprobs": None,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "policy_loss": "clip",
    "importance_level": "token",
    "return_stats": True,
    "temperature": 1.0,
}
"""Settings of `kepo_step` that these losses take for granted."""
IRRELEVANT = {"impl", "workspace_bytes"}  # where there is one back-end and no chunk

Result = tuple[Tensor, TokenStats]


def kepo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    gate: Tensor,
    completion_mask: Tensor,
    policy_weights: Tensor,
    distill_weights: Tensor,
    distill_coef: float,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    **settings: object,
) -> Result:
    """As `fused_kepo_loss`, the teacher's states those of the open sequences; 0 < beta < 1."""
    refuse_others(settings)
    opened = gate > 0
    log_q = log_softmax(hidden[completion_mask], lm_head)  # (n, V)
    with torch.no_grad():
        log_p = log_softmax(teacher_hidden[completion_mask[opened]], teacher_lm_head)
    distilled = (completion_mask & opened[:, None])[completion_mask]  # (n,)
    # To select all rows would be to copy them.
    divergence = jsd(log_q if bool(distilled.all()) else log_q[distilled], log_p, beta)
    del log_p
    weights = distill_weights[completion_mask][distilled]
    loss, stats = policy_part(
        log_q, targets, advantages, completion_mask, policy_weights, epsilon_low, epsilon_high
    )
    stats.divergence[completion_mask & opened[:, None]] = divergence.detach()
    return loss + distill_coef * (weights * divergence).sum(), stats


def grpo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor,
    weights: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    **settings: object,
) -> Result:
    """As `fused_grpo_loss`."""
    refuse_others(settings)
    log_q = log_softmax(hidden[completion_mask], lm_head)
    return policy_part(
        log_q, targets, advantages, completion_mask, weights, epsilon_low, epsilon_high
    )


def log_softmax(states: Tensor, lm_head: Tensor) -> Tensor:
    """(n, H), (V, H) -> (n, V); the logits are gone when it returns."""
    return (states @ lm_head.T).log_softmax(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """beta KL(p|m) + (1 - beta) KL(q|m), m = (1 - beta) q + beta p: (n, V), (n, V) -> (n,)."""
    shift = log(beta / (1 - beta))  # at 0.5 none, and no copy of log_p
    log_m = torch.logaddexp(log_q, log_p + shift if shift else log_p) + log(1 - beta)
    kl_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    kl_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return beta * kl_p + (1 - beta) * kl_q


def policy_part(
    log_q: Tensor,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> Result:
    """The clipped objective on the tokens of the mask, and their numbers, divergence still 0."""
    logprobs = log_q.gather(-1, targets[mask].unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - logprobs.detach()).exp()
    advantages = advantages.unsqueeze(1).expand(mask.shape)[mask]
    bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    stats = TokenStats(*(torch.zeros(mask.shape) for _ in range(3)))
    stats.logprobs[mask] = logprobs.detach()
    with torch.no_grad():
        entropy = [-(part.exp() * part).sum(-1) for part in log_q.split(SLICE)]
    stats.entropy[mask] = torch.cat(entropy)
    return (weights[mask] * losses).sum(), stats


def refuse_others(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        if name not in IRRELEVANT and (name not in DEFAULTS or value != DEFAULTS[name]):
            raise ValueError(
                f"{name}={value!r}: the whole-matrix losses know the settings of a default run only"
            )
