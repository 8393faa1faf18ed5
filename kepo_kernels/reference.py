"""The oracle: every loss of this package as whole-matrix, differentiable PyTorch.

Plain on purpose: no chunks, no kernels, no tricks, no import of ours, any float dtype (use fp64 to
judge others). It holds several [N, V] matrices, which is what the rest of the package exists to
avoid. Masked and gated rows are selected away before any arithmetic, so what stands in them cannot
matter.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def project(hidden: Tensor, lm_head: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, H) hidden states, (V, H) head -> (n, V) logits."""
    return hidden @ lm_head.T if bias is None else hidden @ lm_head.T + bias


def token_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log q(target), q = softmax(logits / temperature): (n, V), (n,) -> (n,)."""
    log_q = (logits / temperature).log_softmax(-1)
    return log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum q log q in nats: (n, V) -> (n,)."""
    return -_expectation((logits / temperature).log_softmax(-1)).sum(-1)


def token_divergence(
    logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """GKD's divergence over the columns both vocabularies share: (n, V), (n, V_t) -> (n,).

    beta = 0: KL(p|q), teacher first; beta = 1: KL(q|p); between: beta KL(p|m) + (1 - beta) KL(q|m)
    with m = (1 - beta) q + beta p (Agarwal et al. 2024, eq. 1, teacher p, student q).
    """
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    log_q = (logits[..., :shared] / temperature).log_softmax(-1)
    log_p = (teacher_logits[..., :shared] / temperature).log_softmax(-1)
    if beta == 0.0:
        return _expectation(log_p, log_q).sum(-1)
    if beta == 1.0:
        return _expectation(log_q, log_p).sum(-1)
    log_beta = torch.tensor(beta, dtype=logits.dtype, device=logits.device).log()
    log_rest = torch.tensor(1.0 - beta, dtype=logits.dtype, device=logits.device).log()
    # Where neither can produce the token m is 0 too, and the gradient of logaddexp is NaN.
    dead = (log_q == -torch.inf) & (log_p == -torch.inf)
    log_m = torch.logaddexp(
        torch.where(dead, 0, log_q + log_rest), torch.where(dead, 0, log_p + log_beta)
    )
    return beta * _expectation(log_p, log_m).sum(-1) + (1.0 - beta) * _expectation(
        log_q, log_m
    ).sum(-1)


def _expectation(log_a: Tensor, log_b: Tensor | None = None) -> Tensor:
    """a (log a - log b), elementwise, with 0 where a is 0.

    Masked twice so that autograd meets no inf - inf.
    """
    alive = log_a > -torch.inf
    safe_a = torch.where(alive, log_a, 0)
    safe_b = 0 if log_b is None else torch.where(alive, log_b, 0)
    return torch.where(alive, safe_a.exp() * (safe_a - safe_b), 0)


def reduction_weights(
    completion_mask: Tensor, gate: Tensor | None = None, reduction: str = "token_mean"
) -> Tensor:
    """(B, T) or (N,) weights whose inner product with a per-token term is that term's `reduction`.

    token_mean: divided by the number of active tokens; sequence_mean: each sequence's token mean,
    averaged over all B sequences (in a flat (N,) call every token is its own sequence); sum: not
    divided. `gate` multiplies.
    """
    weights = completion_mask.double()
    if gate is not None:
        weights = weights * gate.double().reshape(-1, *[1] * (weights.dim() - 1))
    if reduction == "token_mean":
        return weights / weights.ne(0).sum().clamp(min=1)
    if reduction == "sequence_mean":
        if weights.dim() == 1:
            return weights / max(1, weights.numel())
        return weights / completion_mask.double().sum(-1, keepdim=True).clamp(min=1) / len(weights)
    if reduction == "sum":
        return weights
    raise ValueError(f"reduction {reduction!r} is not token_mean, sequence_mean or sum")


def clipped_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) per token.

    r = exp(logprobs - old_logprobs)
    """
    ratio = torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))
    clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy|ref): exp(d) - d - 1 with d = ref_logprobs - logprobs."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1.0


def _total(
    weights: Tensor, term: Callable[[Tensor], Tensor], like: Tensor, scale: float = 1.0
) -> Tensor:
    """sum(weights * term) over the rows of non-zero weight; exactly 0 when there is none."""
    rows = weights.reshape(-1).nonzero().squeeze(-1)
    if rows.numel() == 0:
        return like.reshape(-1)[:0].sum()
    return scale * (weights.reshape(-1)[rows].to(like.dtype) * term(rows)).sum()


def gated_kd_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "token_mean",
) -> Tensor:
    """Oracle of `kepo_kernels.fused_gated_kd_loss` (`teacher_hidden` for every sequence)."""
    lead = hidden.shape[:-1]
    mask = torch.ones(lead, device=hidden.device) if completion_mask is None else completion_mask
    if weights is None:
        weights = reduction_weights(mask, gate, reduction)
    else:
        weights = weights * reduction_weights(mask, gate, "sum")
    student, teacher = hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)

    def term(rows: Tensor) -> Tensor:
        return token_divergence(
            project(student[rows], lm_head, bias),
            project(teacher[rows], teacher_lm_head, teacher_bias).detach(),
            beta,
            temperature,
        )

    return _total(weights, term, hidden)


def grpo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    reduction: str = "sequence_mean",
) -> Tensor:
    """Oracle of `kepo_kernels.fused_grpo_loss`."""
    lead = hidden.shape[:-1]
    mask = torch.ones(lead, device=hidden.device) if completion_mask is None else completion_mask
    weights = reduction_weights(mask, None, reduction) if weights is None else weights * mask
    if advantages.shape != lead:
        advantages = advantages.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
    flat = hidden.flatten(0, -2)

    def term(rows: Tensor) -> Tensor:
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(-1)[rows]

        logits = project(flat[rows], lm_head, bias)
        logprobs = token_logprob(logits, targets.reshape(-1)[rows], temperature)
        loss = clipped_policy_loss(
            logprobs, pick(advantages), pick(old_logprobs), epsilon_low, epsilon_high
        )
        if ref_logprobs is not None and kl_coef != 0.0:
            loss = loss + kl_coef * k3(logprobs, pick(ref_logprobs))
        return loss - entropy_coef * token_entropy(logits, temperature)

    return _total(weights, term, hidden)


def kepo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    gate: Tensor,
    completion_mask: Tensor | None = None,
    distill_coef: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    policy_reduction: str = "sequence_mean",
    distill_reduction: str = "token_mean",
    **policy: object,
) -> Tensor:
    """Oracle of `kepo_kernels.fused_kepo_loss`.

    It is the sum of the two losses above, each with its own reduction.
    """
    return grpo_loss(
        hidden,
        lm_head,
        targets,
        advantages,
        completion_mask=completion_mask,
        temperature=temperature,
        bias=bias,
        reduction=policy_reduction,
        **policy,
    ) + distill_coef * gated_kd_loss(
        hidden,
        lm_head,
        teacher_hidden,
        teacher_lm_head,
        gate=gate,
        completion_mask=completion_mask,
        beta=beta,
        temperature=temperature,
        bias=bias,
        teacher_bias=teacher_bias,
        reduction=distill_reduction,
    )
