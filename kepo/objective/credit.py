"""Credit for a completion: its advantage within its group, whether it is good enough to be
distilled on, and its importance weight if another distribution sampled it than the one trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kepo_kernels import sampler_weights

STD_FLOOR = 1e-4  # of the official implementation; keeps nearly equal rewards from exploding


def group_advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """(P, G) rewards -> (P, G) advantages (r - mean) / (std + 1e-4), std with G - 1 degrees of
    freedom.

    A group of equal rewards gets exactly 0. scale_rewards "batch" divides by the std of all P G
    rewards instead, with P G - 1 degrees of freedom; "none" leaves out the division. (GRPO, Shao et
    al. 2024; constants as in KEPO. By the batch: Lite PPO, Liu et al. 2025; without division: Dr.
    GRPO, Liu et al. 2025.)
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"group_advantages: rewards has shape {tuple(rewards.shape)}; expected (groups, "
            "samples) with at least two samples"
        )
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(-1, keepdim=True) + STD_FLOOR)
    elif scale_rewards == "batch":
        advantages = advantages / (rewards.std() + STD_FLOOR)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, 0.0, advantages)


def quality_gate(quality: Tensor, threshold: float | None, side: str = "right") -> Tensor:
    """(B,) quality -> (B,) fp32 gate: 1 where quality >= threshold, else 0.

    threshold None: a soft gate, max(quality, 0). (The indicator 1[r_i >= tau] of KEPO, arXiv
    2602.00400, on a reward of your choice.) side "wrong": 1 where -inf < quality < threshold, else
    0; it takes a threshold. (There, says arXiv 2605.10889, distillation agrees best with the
    reward.)
    """
    if threshold is None:
        return quality.float().clamp(min=0.0)
    if side == "wrong":
        return ((quality < threshold) & (quality > -torch.inf)).float()
    return (quality >= threshold).float()


def correction_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, own: Tensor, cap: float
) -> Tensor:
    """(B, T) weights of the policy term of tokens that were sampled without a hint; 1 elsewhere.

    min(q / b, cap), q = exp(logprobs), b = exp(sampler_logprobs): they differ where the sampler
    computes in another way. (Truncated importance sampling, Yao et al. 2025.)

    Args:
        logprobs: (B, T), of the policy that sampled, as the trainer computes them.
        sampler_logprobs: (B, T), as the sampler did; NaN, where nobody sampled, weighs 1.
        own: (B, T) bool, the tokens of completions sampled without a hint.
    """
    sampled = own & ~sampler_logprobs.isnan()
    weights = sampler_weights(logprobs, sampler_logprobs, sampled, high=cap)
    return torch.where(sampled, weights, 1.0)


def hinted_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    hinted: Tensor,
    correction: str,
    cap: float,
    gamma: float,
) -> Tensor:
    """(B, T) weights of the policy term of completions that were sampled with a hint; 1 elsewhere.

        "truncate"   min(q / b, cap)         q = exp(logprobs), b = exp(sampler_logprobs)
        "shape"      gamma q / (q + gamma)^2

    q is the policy's probability of a token under the plain question, b that with the hint, from
    which it was drawn. "shape" is the gradient of q / (q + gamma) over that of log q: it spares the
    unlikely tokens that the ratio would silence (LUFFY, Yan et al. 2025).

    Args:
        logprobs: (B, T), of the policy that sampled, without the hint.
        sampler_logprobs: (B, T), with it; read by "truncate" alone.
        hinted: (B, T) bool, the tokens of completions sampled with a hint.
    """
    if correction == "truncate":
        weights = sampler_weights(logprobs, sampler_logprobs, hinted, high=cap)
    elif correction == "shape":
        q = logprobs.detach().double().exp()
        weights = gamma * q / (q + gamma).square()
    else:
        raise ValueError(
            f"hinted_weights: correction is {correction!r}; expected 'truncate' or 'shape'"
        )
    return torch.where(hinted, weights, 1.0)
