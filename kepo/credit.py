"""Credit for a completion: its advantage within its group, and whether it is good enough to be
distilled on.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # of the official implementation; keeps nearly equal rewards from exploding


def group_advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards -> (P, G) advantages (r - mean) / (std + 1e-4), std with G - 1 degrees of
    freedom.

    A group of equal rewards gets exactly 0. (GRPO, Shao et al. 2024; constants as in KEPO.)
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"group_advantages: rewards has shape {tuple(rewards.shape)}; expected (groups, "
            "samples) with at least two samples"
        )
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = centred / (rewards.std(-1, keepdim=True) + STD_FLOOR)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, 0.0, advantages)


def quality_gate(quality: Tensor, threshold: float | None) -> Tensor:
    """(B,) quality -> (B,) bool, open where quality >= threshold; None opens every gate.

    (The indicator 1[r_i >= tau] of KEPO, arXiv 2602.00400, on a reward of your choice.)
    """
    if threshold is None:
        return torch.ones_like(quality, dtype=torch.bool)
    return quality >= threshold
