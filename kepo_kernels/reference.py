"""The oracle: every loss of this package as whole-matrix, differentiable PyTorch.

Plain on purpose: no chunks, no kernels, no tricks, no import from this package, any float dtype
(use fp64 to judge others). It holds several [N, V] matrices, which the rest of the package exists
to avoid. Masked and gated rows are removed before any arithmetic, so their values cannot matter.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0  # before exp: beyond it ratios and k3 are constant, their gradient 0


class LoRALike(Protocol):
    """What `project` reads of a low-rank update: weight + scale * b @ a."""

    @property
    def a(self) -> Tensor: ...  # (r, H)
    @property
    def b(self) -> Tensor: ...  # (V, r)
    @property
    def scale(self) -> float: ...


class HeadLike(Protocol):
    """What `project` reads of a head that is more than its weight."""

    @property
    def weight(self) -> Tensor: ...  # (V, H)
    @property
    def softcap(self) -> float | None: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def lora(self) -> LoRALike | None: ...


class TopKLike(Protocol):
    """What the losses read of a teacher of K tokens."""

    @property
    def ids(self) -> Tensor: ...  # (B, T, K) or (N, K)
    @property
    def logprobs(self) -> Tensor: ...


def project(hidden: Tensor, lm_head: Tensor | HeadLike, bias: Tensor | None = None) -> Tensor:
    """Compute (n, V) logits from (n, H) hidden states and a head of V tokens.

        logits = softcap tanh(y / softcap)
        y = logit_scale (hidden @ weight^T + scale (hidden @ a^T) @ b^T + bias)

    lm_head: the weight (V, H), or anything with `.weight`, `.softcap` (None = no cap),
    `.logit_scale`, `.lora` (None, or with `.a` (r, H), `.b` (V, r) and `.scale`) and `.bias` (None,
    or (V,)), which the argument `bias` replaces. A logit of -inf, a token ruled out, stays -inf
    under a softcap. If dtypes differ, the product is in the wider.
    """
    lora = None if isinstance(lm_head, Tensor) else lm_head.lora
    given = [hidden, lm_head if isinstance(lm_head, Tensor) else lm_head.weight]
    if lora is not None:
        given += [lora.a, lora.b]
    wide = reduce(torch.promote_types, (x.dtype for x in given))
    hidden, weight, *low = (x.to(wide) for x in given)
    logits = hidden @ weight.T
    if lora is not None:
        logits = logits + lora.scale * (hidden @ low[0].T) @ low[1].T
    if bias is None:
        bias = getattr(lm_head, "bias", None)
    if bias is not None:
        logits = logits + bias
    if isinstance(lm_head, Tensor):
        return logits
    logits = lm_head.logit_scale * logits
    if lm_head.softcap is None:
        return logits
    capped = lm_head.softcap * (logits / lm_head.softcap).tanh()  # flat at -inf: gradient 0
    return torch.where(logits > -torch.inf, capped, -torch.inf)


def token_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log q(target), q = softmax(logits / temperature): (n, V), (n,) -> (n,)."""
    log_q = (logits / temperature).log_softmax(-1)
    return log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy -sum q log q in nats: (n, V) -> (n,)."""
    return -_expectation((logits / temperature).log_softmax(-1)).sum(-1)


def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    beta: float,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """Compute GKD's divergence over the columns both vocabularies share: (n, V), (n, V_t) -> (n,).

    beta = 0: KL(p|q), teacher first; beta = 1: KL(q|p); between: beta KL(p|m) + (1 - beta) KL(q|m)
    with m = (1 - beta) q + beta p (Agarwal et al. 2024, eq. 1). q = softmax(logits / temperature),
    p = softmax(teacher_logits / teacher_temperature); None = the student's temperature.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    log_q = (logits[..., :shared] / temperature).log_softmax(-1)
    log_p = (teacher_logits[..., :shared] / teacher_temperature).log_softmax(-1)
    return _divergence(log_q, log_p, beta)


def top_k_divergence(
    logits: Tensor, ids: Tensor, logprobs: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """Compute the divergence over K tokens and their tail: (n, V), (n, K), (n, K) -> (n,).

    Both distributions have K + 1 bins: q those of softmax(logits / temperature), the tail being
    what the K leave; p exp(logprobs) and 1 - their sum, at least 1e-7, divided by its own sum. A
    tail of which q can have no token is no bin. ids of -1 pad.
    """
    log_q = (logits / temperature).log_softmax(-1)
    listed = ids >= 0
    of_k = torch.where(listed, log_q.gather(-1, ids.long().clamp(min=0)), -torch.inf)
    taken = torch.zeros_like(logits, dtype=torch.int64)
    taken = taken.scatter_add(-1, ids.long().clamp(min=0), listed.long()) > 0
    rest = torch.where(taken, -torch.inf, log_q)
    lives = (rest > -torch.inf).any(-1, keepdim=True)
    tail = torch.where(lives, torch.where(lives, rest, 0.0).logsumexp(-1, keepdim=True), -torch.inf)
    p = torch.where(listed, logprobs, -torch.inf).exp()
    p_tail = torch.where(lives, (1.0 - p.sum(-1, keepdim=True)).clamp(min=1e-7), 0.0)
    p = torch.cat((p, p_tail.to(p)), -1).detach()
    log_p = (p / p.sum(-1, keepdim=True)).log().to(log_q)
    return _divergence(torch.cat((of_k, tail), -1), log_p, beta)


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Compute D_beta of two distributions by their logarithms, (n, V) each -> (n,)."""
    if beta == 0.0:
        return _expectation(log_p, log_q).sum(-1)
    if beta == 1.0:
        return _expectation(log_q, log_p).sum(-1)
    log_beta = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device).log()
    log_rest = torch.tensor(1.0 - beta, dtype=log_q.dtype, device=log_q.device).log()
    # Where neither can produce the token m is 0 too, and the gradient of logaddexp is NaN.
    dead = (log_q == -torch.inf) & (log_p == -torch.inf)
    log_m = torch.logaddexp(
        torch.where(dead, 0, log_q + log_rest), torch.where(dead, 0, log_p + log_beta)
    )
    return beta * _expectation(log_p, log_m).sum(-1) + (1.0 - beta) * _expectation(
        log_q, log_m
    ).sum(-1)


def _expectation(log_a: Tensor, log_b: Tensor | None = None) -> Tensor:
    """Compute a (log a - log b), elementwise, with 0 where a is 0.

    Masked twice so that autograd meets no inf - inf.
    """
    alive = log_a > -torch.inf
    safe_a = torch.where(alive, log_a, 0)
    safe_b = 0 if log_b is None else torch.where(alive, log_b, 0)
    return torch.where(alive, safe_a.exp() * (safe_a - safe_b), 0)


def linear_divergence(
    hidden: Tensor,
    lm_head: Tensor | HeadLike,
    teacher_hidden: Tensor | TopKLike,
    teacher_lm_head: Tensor | HeadLike | None = None,
    *,
    completion_mask: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """The oracle of `kepo_kernels.fused_linear_divergence`: (B, T) or (N,), 0 outside the mask.

    A teacher of K tokens is anything with `.ids` and `.logprobs`, (B, T, K) or (N, K) each.
    """
    lead = hidden.shape[:-1]
    mask = torch.ones(lead, device=hidden.device) if completion_mask is None else completion_mask
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    logits = project(hidden.flatten(0, -2)[rows], lm_head, bias)
    if not isinstance(teacher_hidden, Tensor):
        listed = teacher_hidden.ids, teacher_hidden.logprobs
        ids, logprobs = (x.flatten(0, -2)[rows] for x in listed)
        found = top_k_divergence(logits, ids, logprobs, beta, temperature)
    else:
        assert teacher_lm_head is not None, "states come with a head"
        states = teacher_hidden.flatten(0, -2)[rows]
        teacher_logits = project(states, teacher_lm_head, teacher_bias).detach()
        found = token_divergence(logits, teacher_logits, beta, temperature, teacher_temperature)
    return found.new_zeros(mask.numel()).index_put((rows,), found).reshape(lead)


def reduction_weights(
    completion_mask: Tensor, gate: Tensor | None = None, reduction: str = "token_mean"
) -> Tensor:
    """Compute (B, T) or (N,) weights whose inner product with a per-token term is its `reduction`.

    token_mean: divided by the number of active tokens; sequence_mean: each sequence's token mean,
    averaged over all B sequences (in a flat (N,) call every token is its own sequence); sum: not
    divided. `gate` (B,) or (N,) multiplies the weights of its sequences; None leaves them.
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


def policy_term(
    policy_loss: str | Callable[[Tensor, Tensor, Tensor], Tensor],
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tensor:
    """The policy loss per token: (n,) each -> (n,). r = exp(min(log_ratio, 20)), A = advantages.

        "clip"       -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)
        "cispo"      -stopgrad(min(r, 1 + epsilon_high)) A logprob
        "sapo"       -(4 / t) sigmoid(t (r - 1)) A,  t = sapo_temperature_pos if A > 0,
                                                         sapo_temperature_neg otherwise
        "reinforce"  -A logprob
        a callable   policy_loss(logprobs, log_ratio, advantages)

    "clip" is PPO's (Schulman et al. 2017, eq. 7), with unequal bounds DAPO's (Yu et al. 2025), with
    delta also bounded where A < 0 (dual clip, Ye et al. 2020; None disables it). "cispo" is
    MiniMax-M1's (2025), of whose two bounds it has the upper one; TRL bounds r by epsilon_high
    itself, so its 5.0 is our 4.0, and verl below as well, by 1 - epsilon_low. "sapo": arXiv
    2511.20347.
    """
    if callable(policy_loss):
        return policy_loss(logprobs, log_ratio, advantages)
    if policy_loss == "reinforce":
        return -advantages * logprobs
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    if policy_loss == "clip":
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
        return -torch.minimum(bounded * advantages, clipped * advantages)
    if policy_loss == "cispo":
        return -ratio.clamp(max=1.0 + epsilon_high).detach() * advantages * logprobs
    if policy_loss == "sapo":
        pos, neg = (logprobs.new_tensor(t) for t in (sapo_temperature_pos, sapo_temperature_neg))
        t = torch.where(advantages > 0, pos, neg)
        return -4.0 / t * torch.sigmoid(t * (ratio - 1.0)) * advantages
    raise ValueError(f"policy_loss {policy_loss!r} is not clip, cispo, sapo, reinforce or callable")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Compute Schulman's estimate of KL(policy|ref) from a sampled token, with d = ref - logprob.

    k1 = -d, k2 = d^2 / 2, k3 = e^m - m - 1, m = min(d, 20) (Schulman, "Approximating KL
    divergence", 2020; his k3 has no bound).

    k1 and k3 have the mean KL(policy|ref) under the policy's samples; their gradients do not have
    its gradient. In expectation, of a sample that is not differentiated,

        k1    grad log q                0: it teaches nothing
        k2    -d grad log q             the gradient of KL(policy|ref)
        k3    (1 - e^d) grad log q      the gradient of KL(ref|policy), below the bound

    Multiplied by the ratio of policy and sampling policy, gradient included (kl_bias_correction),
    k1 and k3 have the gradient of KL(policy|ref), and k2 that of its own mean.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2.0
    if estimator == "k3":
        difference = difference.clamp(max=LARGEST_LOG_RATIO)
        return difference.expm1() - difference
    raise ValueError(f"kl_estimator {estimator!r} is not k1, k2 or k3")


def sequence_mean(values: Tensor, sequences: Tensor) -> Tensor:
    """Replace each value by the mean of its sequence: (n,), (n,) sequence numbers -> (n,)."""
    _, sequences, lengths = sequences.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(lengths)).index_add(0, sequences, values)
    return (sums / lengths)[sequences]


def _total(weights: Tensor, term: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Sum weights * term over the rows of non-zero weight; exactly 0 when there is none."""
    rows = weights.reshape(-1).nonzero().squeeze(-1)
    if rows.numel() == 0:
        return like.reshape(-1)[:0].sum()
    return (weights.reshape(-1)[rows].to(like.dtype) * term(rows)).sum()


def gated_kd_loss(
    hidden: Tensor,
    lm_head: Tensor | HeadLike,
    teacher_hidden: Tensor | TopKLike,
    teacher_lm_head: Tensor | HeadLike | None = None,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "token_mean",
) -> Tensor:
    """The oracle of `kepo_kernels.fused_gated_kd_loss` (`teacher_hidden` for every sequence).

    sum(w * linear_divergence), heads as `project` reads them; gated as in KEPO, arXiv 2602.00400.
    """
    lead = hidden.shape[:-1]
    mask = torch.ones(lead, device=hidden.device) if completion_mask is None else completion_mask
    if weights is None:
        weights = reduction_weights(mask, gate, reduction)
    else:
        weights = weights * reduction_weights(mask, gate, "sum")
    divergence = linear_divergence(
        hidden,
        lm_head,
        teacher_hidden,
        teacher_lm_head,
        completion_mask=weights != 0,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        bias=bias,
        teacher_bias=teacher_bias,
    )
    return _total(weights, lambda rows: divergence.flatten()[rows], hidden)


def grpo_loss(
    hidden: Tensor,
    lm_head: Tensor | HeadLike,
    targets: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    policy_loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "clip",
    importance_level: str = "token",
    sampler_weights: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    reduction: str = "sequence_mean",
    **policy: Any,
) -> Tensor:
    """The oracle of `kepo_kernels.fused_grpo_loss`.

        sum_t w_t [ s_t policy_term_t + kl_coef kl_estimate_t ] - entropy_coef sum_t h_t entropy_t

    s: sampler_weights, (B,) or per token; None = 1. h: entropy_weights * mask; None = w. The
    log-ratio of `policy_term` is l = logprob - old_logprobs (None: its own detached value).
    importance_level "sequence" puts in its place the mean of l over the sequence's tokens of
    non-zero weight, for each of them (GSPO, Zheng et al. 2025, eq. 4-7). With kl_bias_correction
    the estimate is multiplied by exp(min(l, 20)). `policy`: epsilon_low, epsilon_high, delta,
    sapo_temperature_pos and _neg.
    """
    lead = hidden.shape[:-1]
    mask = torch.ones(lead, device=hidden.device) if completion_mask is None else completion_mask
    weights = reduction_weights(mask, None, reduction) if weights is None else weights * mask
    flat = hidden.flatten(0, -2)
    tokens = lead[1] if len(lead) == 2 else 1  # of a sequence

    def term(rows: Tensor) -> Tensor:
        def pick(x: Tensor) -> Tensor:
            if x.shape != lead:
                x = x.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
            return x.reshape(-1)[rows]

        logits = project(flat[rows], lm_head, bias)
        logprobs = token_logprob(logits, pick(targets), temperature)
        log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else pick(old_logprobs))
        if importance_level == "sequence":
            log_ratio = sequence_mean(log_ratio, rows // tokens)
        elif importance_level != "token":
            raise ValueError(f"importance_level {importance_level!r} is not token or sequence")
        loss = policy_term(policy_loss, logprobs, log_ratio, pick(advantages), **policy)
        if sampler_weights is not None:
            loss = loss * pick(sampler_weights)
        if ref_logprobs is not None and kl_coef != 0.0:
            estimate = kl_estimate(logprobs, pick(ref_logprobs), kl_estimator)
            if kl_bias_correction:
                estimate = estimate * log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
            loss = loss + kl_coef * estimate
        return loss

    def bonus(rows: Tensor) -> Tensor:
        return token_entropy(project(flat[rows], lm_head, bias), temperature)

    total = _total(weights, term, hidden)
    if entropy_coef == 0.0:
        return total
    of_entropy = weights if entropy_weights is None else entropy_weights * mask
    return total - entropy_coef * _total(of_entropy, bonus, hidden)


def kepo_loss(
    hidden: Tensor,
    lm_head: Tensor | HeadLike,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    teacher_hidden: Tensor | TopKLike | None = None,
    teacher_lm_head: Tensor | HeadLike | None = None,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    policy_weights: Tensor | None = None,
    distill_weights: Tensor | None = None,
    distill_coef: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    policy_reduction: str = "sequence_mean",
    distill_reduction: str = "token_mean",
    **policy: Any,
) -> Tensor:
    """The oracle of `kepo_kernels.fused_kepo_loss`: grpo_loss + distill_coef gated_kd_loss.

    Without targets it is the second alone, without teacher_hidden the first. Each has its own
    weights or reduction; `policy` holds the other arguments of `grpo_loss`.
    """
    terms = []
    if targets is not None:
        assert advantages is not None, "targets come with advantages"
        reward = grpo_loss(
            hidden,
            lm_head,
            targets,
            advantages,
            completion_mask=completion_mask,
            weights=policy_weights,
            temperature=temperature,
            bias=bias,
            reduction=policy_reduction,
            **policy,
        )
        terms.append(reward)
    if teacher_hidden is not None:
        distillation = gated_kd_loss(
            hidden,
            lm_head,
            teacher_hidden,
            teacher_lm_head,
            gate=gate,
            completion_mask=completion_mask,
            weights=distill_weights,
            beta=beta,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            bias=bias,
            teacher_bias=teacher_bias,
            reduction=distill_reduction,
        )
        terms.append(distill_coef * distillation)
    if not terms:
        raise ValueError(
            "kepo_loss: neither targets nor teacher_hidden is given; pass either, or both"
        )
    return sum(terms[1:], start=terms[0])
