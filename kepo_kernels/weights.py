"""Masks, gates and normalisers as one vector: the weight of every token in its loss term."""

import torch
from torch import Tensor

from kepo_kernels.validate import Validator, describe


def loss_weights(
    completion_mask: Tensor, gate: Tensor | None = None, reduction: str = "token_mean"
) -> Tensor:
    """Weights w such that sum(w * term) is the gated, masked `reduction` of a per-token term.

        token_mean      w = gate * mask / (number of tokens with gate * mask != 0)
        sequence_mean   w = gate * mask / (tokens of the sequence) / B
        sum             w = gate * mask

    Args:
        completion_mask: (B, T) or (N,), 1 or True on the tokens of the loss. Flat tokens count as
            N sequences.
        gate: (B,) >= 0, or None for all open. It multiplies; 0 takes the sequence out.
        reduction: one of the three above.

    Returns:
        fp64 weights of the mask's shape; exactly 0 outside the mask and the gate, all 0 when
        nothing is left. A micro-batch of a larger batch takes its slice of that batch's weights,
        and its losses add up.
    """
    check = Validator("loss_weights")
    check.require(
        isinstance(completion_mask, Tensor) and completion_mask.dim() in (1, 2),
        f"completion_mask {describe(completion_mask)}; expected a tensor (B, T) or (N,)",
    )
    check.mask(completion_mask, completion_mask.shape)
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


def per_token(x: Tensor, lead: torch.Size) -> Tensor:
    """A (B,) or `lead`-shaped tensor as one value per token: a view of shape `lead`."""
    return x if x.shape == lead else x.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
