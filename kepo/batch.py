"""Rollouts as tensors: padded, weighted, and cut into micro-batches whose losses add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kepo.config import Config
from kepo.credit import group_advantages, quality_gate
from kepo.prompts import question_prompt
from kepo.rollout import Group, total_reward
from kepo.vlm import Prompt
from kepo_kernels import loss_weights


@dataclass(frozen=True)
class Batch:
    """B completions of one optimiser step, or of one micro-batch of it."""

    prompts: tuple[Prompt, ...]
    """The plain questions, one per completion: hints never reach the training forward."""
    completion_ids: Tensor
    """(B, T) int64, padded on the right with 0."""
    completion_mask: Tensor
    """(B, T) bool, True on tokens that carry loss, the end token included."""
    advantages: Tensor
    """(B,) fp32"""
    gate: Tensor
    """(B,) bool"""
    policy_weights: Tensor
    """(B, T) weights of the policy term, normalised over the whole step."""
    distill_weights: Tensor
    """(B, T) weights of the divergence, normalised over the whole step; 0 where the gate is
    closed."""

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of up to ``size`` completions, each cut to its own longest one."""
        return [self._rows(start, start + size) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "prompts"
        }
        return replace(self, **moved)

    def _rows(self, start: int, end: int) -> Batch:
        length = max(1, int(self.completion_mask[start:end].sum(-1).max()))
        cut = {}
        for f in fields(self):
            value = getattr(self, f.name)[start:end]
            cut[f.name] = value[:, :length] if f.name != "prompts" and value.dim() == 2 else value
        return Batch(**cut)


def collate(groups: Sequence[Group], config: Config) -> Batch:
    """Advantages, gate, masks and weights of all rollouts of one step.

    Every group must have the same number of samples. With ``mask_truncated`` a completion that hit
    the length limit keeps its place in the group statistics but carries no loss. The gate reads
    ``gate_reward``; without a teacher to distil from, every gate is closed.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards = torch.tensor([[total_reward(r, config) for r in group] for group in groups])
    quality = torch.tensor(
        [
            total_reward(r, config)
            if config.gate_reward == "total"
            else r.rewards.get(config.gate_reward, 0.0)
            for r in rollouts
        ]
    )
    gate = quality_gate(quality, None if config.gate_reward is None else config.gate_threshold)
    if not config.distils:
        gate = torch.zeros_like(gate)

    ids = pad_sequence([r.completion_ids for r in rollouts], batch_first=True)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    if config.mask_truncated:
        mask &= ~torch.tensor([r.truncated for r in rollouts])[:, None]
    return Batch(
        prompts=tuple(Prompt(question_prompt(r.example), r.example.image) for r in rollouts),
        completion_ids=ids,
        completion_mask=mask,
        advantages=group_advantages(rewards).flatten(),
        gate=gate,
        policy_weights=loss_weights(mask, None, config.policy_reduction),
        distill_weights=loss_weights(mask, gate, config.distill_reduction),
    )
