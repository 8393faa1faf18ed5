"""Per-token weights: masks, gates and normalisers as each token's weight in its loss term.

The losses themselves use `loss_weights`. The other functions are normalisations and corrections
from the literature, by name; pass their results as `weights` (`policy_weights`, `distill_weights`)
or `sampler_weights`.
"""

import torch
from torch import Tensor

from kepo_kernels.validate import Validator, describe, on_cpu

# No difference of log-probabilities is read as more than this before it meets exp, whose value is
# then at most 4.9e8 and whose gradient is 0; the bound is that of verl and slime. e^89 has no fp32.
LARGEST_LOG_RATIO = 20.0


def loss_weights(
    completion_mask: Tensor, gate: Tensor | None = None, reduction: str = "token_mean"
) -> Tensor:
    """Compute weights w such that sum(w * term) is the gated, masked `reduction` of a per-token
    term.

        token_mean      w = gate * mask / (number of tokens with gate * mask != 0)
        sequence_mean   w = gate * mask / (tokens of the sequence) / B
        sum             w = gate * mask

    Args:
        completion_mask: (B, T) or (N,), 1 or True on the tokens of the loss. Flat tokens count as
            N sequences.
        gate: (B,) >= 0, or None if all are open. It multiplies the weights; 0 takes the sequence
            out.
        reduction: one of the three above.

    Returns:
        fp64 weights of the mask's shape; exactly 0 outside the mask and the gate, all 0 when
        nothing is left. A micro-batch of a larger batch takes its slice of that batch's weights,
        and its losses add up.
    """
    check = Validator("loss_weights")
    _check_mask(check, completion_mask)
    check.gate(gate, completion_mask.shape)
    check.reduction("reduction", reduction)
    mask = completion_mask.to(torch.float64)
    weights = mask if gate is None else mask * per_token(gate, mask.shape)
    if reduction == "token_mean":
        return weights / weights.count_nonzero().clamp(min=1)
    if reduction == "sequence_mean":
        lengths = mask if mask.dim() == 1 else mask.sum(-1, keepdim=True)
        return weights / lengths.clamp(min=1) / max(1, len(mask))
    return weights


def grpo_weights(completion_mask: Tensor) -> Tensor:
    """Compute GRPO's weights: the mean over sequences of each sequence's mean over its tokens.

        w = mask / (tokens of the sequence) / B

    (Shao et al. 2024, eq. 3.) (B, T) or (N,) mask -> fp64 weights of its shape. Equals
    `loss_weights(completion_mask, None, "sequence_mean")`, in plain torch
    `mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)`.
    """
    _check_mask(Validator("grpo_weights"), completion_mask)
    return loss_weights(completion_mask, None, "sequence_mean")


def bnpo_weights(completion_mask: Tensor) -> Tensor:
    """Compute weights of the mean over all tokens of this batch, whatever their sequence (TRL's
    "bnpo").

        w = mask / (tokens of this batch)

    (B, T) or (N,) mask -> fp64 weights of its shape. Equals `loss_weights(completion_mask)`, in
    plain torch `mask / mask.sum().clamp(min=1)`. A micro-batch divides by its own tokens; for the
    whole batch's see `dapo_weights`.
    """
    _check_mask(Validator("bnpo_weights"), completion_mask)
    return loss_weights(completion_mask, None, "token_mean")


def dapo_weights(completion_mask: Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """Compute DAPO's weights: the mean over the tokens of the global batch.

        w = mask / num_items

    (Yu et al. 2025.) Plain torch: `mask / num_items`.

    Args:
        completion_mask: (B, T) or (N,), of this micro-batch.
        num_items: tokens of the whole batch, over micro-batches and processes (divided by the
            number of processes where gradients are averaged); a number or a 0-d tensor. None = the
            tokens of this mask, which is `bnpo_weights`.

    Returns:
        fp64 weights of the mask's shape; all 0 where there are no tokens at all.
    """
    check = Validator("dapo_weights")
    _check_mask(check, completion_mask)
    if num_items is None:
        return loss_weights(completion_mask, None, "token_mean")
    if isinstance(num_items, Tensor):
        check.strided("num_items", num_items)
        check.require(
            num_items.dim() == 0 and not num_items.is_complex(),
            f"num_items {describe(num_items)}; expected a number or a 0-d tensor of one",
        )
        if on_cpu(num_items):
            num_items = num_items.item()
    if not isinstance(num_items, Tensor):
        num_items = check.number(
            "num_items", num_items, lambda x: x >= 0, "a finite number >= 0 of tokens"
        )
        check.require(
            num_items > 0 or not on_cpu(completion_mask) or not completion_mask.any(),
            f"num_items={num_items:g}, but completion_mask has tokens; expected the tokens of the "
            "whole batch",
        )
        num_items = completion_mask.new_full((), num_items, dtype=torch.float64)
    items = num_items.to(completion_mask.device, torch.float64)
    return completion_mask.to(torch.float64) / torch.where(items == 0, 1.0, items)


def dr_grpo_weights(completion_mask: Tensor, max_completion_length: int) -> Tensor:
    """Compute Dr. GRPO's weights: a constant, so that a token counts the same in any sequence.

        w = mask / (B max_completion_length)

    (Liu et al. 2025, "Understanding R1-Zero-Like Training".) (B, T) or (N,) mask, N tokens being N
    sequences -> fp64 weights of its shape. Plain torch: `mask / (len(mask) * length)`.
    """
    check = Validator("dr_grpo_weights")
    _check_mask(check, completion_mask)
    sequences = max(1, len(completion_mask))
    longest = check.number(
        "max_completion_length",
        max_completion_length,
        lambda x: 0 < x * sequences < torch.inf,
        "a number > 0, finite also times the number of sequences",
    )
    return completion_mask.to(torch.float64) / (sequences * longest)


def sampler_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
) -> Tensor:
    """Compute weights that correct for completions sampled by another engine than the one that
    trains.

        level "token"    r_t = exp(min(old_t - sampler_t, 20))
        "sequence"       r = exp(min(sum of old_t - sampler_t over the sequence's tokens, 20))
        mode "truncate"  w = min(max(r, low), high)
        "mask"           w = r if low <= r <= high, 0 otherwise

    (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training";
    the four ways of TRL's vllm_importance_sampling_mode.) Plain torch of the first:
    `(old_logprobs - sampler_logprobs).exp().clamp(max=2.0) * mask`.

    Args:
        old_logprobs: (B, T) or (N,), computed by the trainer with the weights that sampled.
        sampler_logprobs: the same shape, the sampling engine's for the same tokens. NaN (it has
            none there) counts as equal to the trainer's.
        completion_mask: values outside of it are not read.
        low, high: bounds of the ratio; None disables the bound.

    Returns:
        Detached fp64 `sampler_weights` for the losses: for level "token" of the mask's
        shape, 0 outside the mask; for "sequence" (B,), where a sequence of no tokens has 1 before
        the bounds are applied.
    """
    check = Validator("sampler_weights")
    _check_mask(check, completion_mask)
    check.choice("level", level, ("token", "sequence"))
    check.choice("mode", mode, ("truncate", "mask"))
    low, high = (
        None
        if bound is None
        else check.number(name, bound, lambda x: x >= 0, "a finite number >= 0, or None for none")
        for name, bound in (("low", low), ("high", high))
    )
    check.require(
        low is None or high is None or low <= high, f"low={low} is above high={high}; exchange them"
    )
    _check_like(
        check, completion_mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs
    )
    present = completion_mask != 0
    check.finite(present, old_logprobs=old_logprobs)
    scored = present & ~sampler_logprobs.isnan()
    check.finite(scored, sampler_logprobs=sampler_logprobs)
    difference = old_logprobs.detach().double() - sampler_logprobs.detach().double()
    difference = torch.where(scored, difference, 0)
    if level == "sequence" and difference.dim() == 2:
        difference = difference.sum(-1)
    ratio = difference.clamp(max=LARGEST_LOG_RATIO).exp()
    low, high = (0.0 if low is None else low), (torch.inf if high is None else high)
    if mode == "truncate":
        ratio = ratio.clamp(low, high)
    else:
        ratio = torch.where((ratio >= low) & (ratio <= high), ratio, 0)
    return ratio if level == "sequence" else torch.where(present, ratio, 0)


def sod_weights(
    steps: Tensor,
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    epsilon: float = 1e-6,
    delta: float = 0.2,
) -> Tensor:
    """Compute SOD's weights: reasoning steps of a completion on which student and teacher have
    drifted apart are distilled less.

        d_k = mean over the tokens of step k of |logprob - teacher_logprob|
        w_k = min((d_first + epsilon) / (d_k + epsilon), 1 + delta),   so w_first = 1

    (arXiv 2605.07725, where w_k is written as a telescoping product over steps.) Multiply them, as
    in `distill_weights=sod_weights(...) * loss_weights(mask, gate)`.

    Args:
        steps: (B, T) integers, the step that each token belongs to, e.g. between tool calls; not
            decreasing along a sequence.
        logprobs, teacher_logprobs: (B, T), both models' of the sampled tokens.
        completion_mask: (B, T); the first step is the first that has a token in it.
        epsilon: > 0, stabilises the quotient.
        delta: >= 0; a step's weight is at most 1 + delta.

    Returns:
        Detached fp64 (B, T), one value per step, 0 outside the mask.
    """
    check = Validator("sod_weights")
    _check_mask(check, completion_mask)
    check.require(
        completion_mask.dim() == 2,
        f"completion_mask {describe(completion_mask)}; expected (B, T): flat tokens have no steps",
    )
    epsilon = check.number("epsilon", epsilon, lambda x: x > 0, "a finite number > 0")
    delta = check.number("delta", delta, lambda x: x >= 0, "a finite number >= 0")
    scores = {"logprobs": logprobs, "teacher_logprobs": teacher_logprobs}
    _check_like(check, completion_mask, steps=steps, **scores)
    check.require(
        steps.dtype in (torch.int64, torch.int32),
        f"steps {describe(steps)}; expected int64 or int32 numbers of steps",
    )
    present = completion_mask != 0
    check.finite(present, **scores)
    # A token outside the mask belongs to the step of the last one before it, and adds nothing.
    lowest = torch.iinfo(steps.dtype).min
    filled = torch.where(present, steps, lowest).cummax(-1).values
    if on_cpu(steps):
        bad = present & (steps < filled)
        check.none_bad("steps", steps, bad, "numbers that never decrease along a sequence")
    started = filled.diff(dim=-1, prepend=filled[:, :1]) != 0
    step = started.cumsum(-1)  # (B, T), 0, 1, 2 ... along each sequence
    gap = (logprobs.detach().double() - teacher_logprobs.detach().double()).abs()
    sums, counts = (
        torch.zeros_like(gap).scatter_add(-1, step, torch.where(present, x, 0.0))
        for x in (gap, torch.ones_like(gap))
    )
    distance = (sums / counts.clamp(min=1)).gather(-1, step)
    if step.shape[1] == 0:
        return distance
    first = distance.gather(-1, present.int().argmax(-1, keepdim=True))
    weights = ((first + epsilon) / (distance + epsilon)).clamp(max=1.0 + delta)
    return torch.where(present, weights, 0)


def _check_mask(check: Validator, completion_mask: Tensor) -> None:
    check.strided("completion_mask", completion_mask)
    check.require(
        isinstance(completion_mask, Tensor) and completion_mask.dim() in (1, 2),
        f"completion_mask {describe(completion_mask)}; expected a tensor (B, T) or (N,)",
    )
    check.mask(completion_mask, completion_mask.shape)


def _check_like(check: Validator, completion_mask: Tensor, **tensors: Tensor) -> None:
    """Check that each tensor has one value per token, on the mask's device."""
    for name, x in tensors.items():
        check.strided(name, x)
        check.require(
            isinstance(x, Tensor) and x.shape == completion_mask.shape,
            f"{name} {describe(x)}; expected the shape of completion_mask, "
            f"{list(completion_mask.shape)}",
        )
        check.require(
            x.device == completion_mask.device,
            f"completion_mask is on {completion_mask.device} and {name} on {x.device}; move one",
        )


def per_token(x: Tensor, lead: torch.Size) -> Tensor:
    """Expand a (B,) or `lead`-shaped tensor to one value per token: a view of shape `lead`."""
    return x if x.shape == lead else x.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
