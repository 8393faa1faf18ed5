"""The loss of a training step as plain PyTorch on whole matrices, the rival of phases.py.

It stands in for `fused_kepo_loss` in `kepo.objective.step`, and is what a careful user writes
there: logits of the tokens that carry loss only, the teacher's without gradient and of the open
sequences only, one log_softmax for both terms and no copy of some of its rows, one shift for both
weights of the mixture, each KL summed before it is weighted, no name that keeps a matrix alive for
longer than autograd does, entropy (a metric) in slices; softmax in fp32 where the model computes in
bf16. At beta 0.5 and with every gate open, forward and backward then hold 8 matrices at their peak;
the usual formula (TRL's, and `jsd` in peers.py) holds 9 or more, and `kepo_kernels/reference.py`,
whose guards against -inf each copy a matrix, more again.

It knows the settings of a default run only and reads no other: phases.py compares loss and
gradients before it times them.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from kepo_kernels import Head, TokenStats

SLICE = 128  # tokens whose entropy is taken at once
Result = tuple[Tensor, TokenStats]


def kepo_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    targets: Tensor,
    advantages: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_lm_head: Tensor | Head | None = None,
    *,
    completion_mask: Tensor,
    policy_weights: Tensor,
    distill_weights: Tensor | None = None,
    distill_coef: float,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    **settings: object,
) -> Result:
    """As `fused_kepo_loss`, the teacher's states those of the open sequences; 0 < beta < 1."""
    clip = epsilon_low, epsilon_high
    policy_weights = policy_weights.to(hidden.device)  # a batch has its weights on the host
    if distill_weights is not None:
        distill_weights = distill_weights.to(hidden.device)
    if teacher_hidden is None:
        parts = [(completion_mask, log_softmax(hidden[completion_mask], lm_head))]
        return policy_part(parts, targets, advantages, policy_weights, *clip)
    sequences = distill_weights.any(-1)
    opened = completion_mask & sequences[:, None]
    closed = completion_mask & ~opened
    # Open and closed sequences apart: to select rows of one log_q would be to copy them.
    log_q = log_softmax(hidden[opened], lm_head)  # (n, V)
    with torch.no_grad():
        log_p = log_softmax(teacher_hidden[completion_mask[sequences]], teacher_lm_head)
    divergence = jsd(log_q, log_p, beta)
    del log_p
    parts = [(opened, log_q)]
    if bool(closed.any()):
        parts.append((closed, log_softmax(hidden[closed], lm_head)))
    loss, stats = policy_part(parts, targets, advantages, policy_weights, *clip)
    stats.divergence[opened] = divergence.detach()
    return loss + distill_coef * weighted(divergence, distill_weights[opened]), stats


def log_softmax(states: Tensor, lm_head: Tensor | Head) -> Tensor:
    """(n, H), (V, H) -> (n, V); the logits are gone when it returns."""
    return (states @ Head.of(lm_head).weight.T).float().log_softmax(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """beta KL(p|m) + (1 - beta) KL(q|m), m = (1 - beta) q + beta p: (n, V), (n, V) -> (n,)."""
    shift = log(beta / (1 - beta))  # at 0.5 none, and no copy of log_p
    log_m = torch.logaddexp(log_q, log_p + shift if shift else log_p) + log(1 - beta)
    kl_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    kl_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return beta * kl_p + (1 - beta) * kl_q


def policy_part(
    parts: list[tuple[Tensor, Tensor]],
    targets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> Result:
    """The clipped objective on tokens by the part they are in, and their numbers, divergence 0.

    parts: a mask (B, T) and log_q (n, V) of its tokens, each.
    """
    loss = torch.zeros((), device=targets.device)
    stats = TokenStats(*(torch.zeros(targets.shape, device=targets.device) for _ in range(3)))
    advantages = advantages.unsqueeze(1).expand(targets.shape)
    for mask, log_q in parts:
        logprobs = log_q.gather(-1, targets[mask].unsqueeze(-1)).squeeze(-1)
        ratio = (logprobs - logprobs.detach()).exp()
        bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        losses = -torch.minimum(ratio * advantages[mask], bounded * advantages[mask])
        loss = loss + weighted(losses, weights[mask])
        stats.logprobs[mask] = logprobs.detach()
        with torch.no_grad():
            entropy = [-(part.exp() * part).sum(-1) for part in log_q.split(SLICE)]
        stats.entropy[mask] = torch.cat(entropy)
    return loss, stats


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Their inner product in the values' dtype; a batch has its weights in fp64."""
    return (weights.to(values.dtype) * values).sum()
