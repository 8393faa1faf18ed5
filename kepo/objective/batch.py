"""Rollouts as tensors: padded, and weighted so that the losses of micro-batches add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kepo.models.encoding import Prompt
from kepo.objective.credit import group_advantages, quality_gate
from kepo.rollout.types import Group, Rollout, reward_of, total_rewards
from kepo.sections import ObjectiveConfig
from kepo.teachers.several import place_of
from kepo_kernels import dr_grpo_weights, loss_weights
from kepo_kernels.compute.devices import moved


@dataclass(frozen=True)
class Batch:
    """B completions of one step, of a mini-batch of it, or of a micro-batch of that."""

    prompts: tuple[Prompt, ...]
    """The plain questions, one per completion: hints never reach the training forward."""
    teacher_prompts: tuple[Prompt, ...]
    """What the teacher reads before each completion: the plain question, or with ``hint_for:
    teacher`` the question and a hint."""
    completion_ids: Tensor
    """(B, T) int64, padded on the right with 0."""
    completion_mask: Tensor
    """(B, T) bool, True on tokens that carry loss, the end token included."""
    advantages: Tensor
    """(B,) fp32 advantage of each completion."""
    policy_weights: Tensor
    """(B, T) weights of the policy term, normalised over the whole mini-batch."""
    distill_weights: Tensor
    """(B, T) weights of the divergence, the gate among their factors, normalised over the whole
    mini-batch."""
    sampler_logprobs: Tensor
    """(B, T) fp32 log-probabilities under the law that sampled; NaN where none did."""
    hinted: Tensor
    """(B,) bool, sampled with a hint."""
    teacher: Tensor
    """(B,) int64 place of its teacher among the teachers; 0 where there is one, or none."""
    mini: Tensor
    """(B,) int64 number of the mini-batch that a completion is part of, from 0."""
    old_logprobs: Tensor | None = None
    """(B, T) fp32, of the policy before the step's first update; None in the first iteration."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def opened(self) -> Tensor:
        """(B,) bool, True for completions that are distilled on: a token has a weight above 0."""
        return self.distill_weights.any(-1)

    def to(self, device: torch.device) -> Batch:
        there: dict[str, Any] = {n: moved(x, device) for n, x in self._tensors().items()}
        return replace(self, **there)

    def select(self, places: Sequence[int]) -> Batch:
        """Return the completions at these places, in this order, cut to the longest of them."""
        length = max(1, int(self.completion_mask[places].sum(-1).max()))
        cut: dict[str, Any] = {
            name: x[places, :length] if x.dim() == 2 else x[places]
            for name, x in self._tensors().items()
        }
        for name in ("prompts", "teacher_prompts"):
            cut[name] = tuple(getattr(self, name)[place] for place in places)
        return replace(self, **cut)

    def mini_batches(self) -> list[Batch]:
        """Return the mini-batches, each for an optimiser step of its own."""
        count = int(self.mini.max()) + 1
        if count == 1:
            return [self]
        return [self.select((self.mini == n).nonzero().squeeze(-1).tolist()) for n in range(count)]

    def lossless(self) -> Batch:
        """Return one completion without any loss."""
        row = self.select([0])
        return replace(
            row,
            completion_mask=torch.zeros_like(row.completion_mask),
            policy_weights=torch.zeros_like(row.policy_weights),
            distill_weights=torch.zeros_like(row.distill_weights),
        )

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}


def collate(
    groups: Sequence[Group], config: ObjectiveConfig, data: Sequence[Rollout] = ()
) -> Batch:
    """Return advantages, masks and weights of all rollouts of one step.

    Every group must have the same number of samples; ``data`` are the dataset's own solutions, each
    by itself with advantage 1. Groups and solutions are dealt out to the mini-batches one by one,
    whole; a mini-batch's weights are what they would be if it were all of the step. With
    ``mask_truncated`` a completion that hit the length limit keeps its place in the group
    statistics but carries no loss. The gate reads ``gate_reward``; without a teacher to distil
    from, every gate is closed.
    """
    rollouts = [rollout for group in groups for rollout in group] + list(data)
    advantages = torch.ones(len(data))
    if groups:
        relative = group_advantages(total_rewards(groups, config), config.scale_rewards)
        advantages = torch.cat([relative.flatten(), advantages])

    ids = pad_sequence([r.completion_ids for r in rollouts], batch_first=True)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    if config.mask_truncated:
        mask &= ~torch.tensor([r.truncated for r in rollouts])[:, None]
    mini = _dealt_out([*map(len, groups), *[1] * len(data)], config.mini_batches)
    from_data = torch.arange(len(rollouts)) >= len(rollouts) - len(data)
    gate = gates(rollouts, config)
    policy_weights, distill_weights = _weights(mask, gate, mini, from_data, config)
    taught = [place_of(r.example, config) if config.distils else 0 for r in rollouts]
    unknown = [torch.full((len(r.completion_ids),), torch.nan) for r in rollouts]
    drawn = [
        nan if r.sampler_logprobs is None else r.sampler_logprobs
        for r, nan in zip(rollouts, unknown, strict=True)
    ]
    return Batch(
        prompts=tuple(r.prompt for r in rollouts),
        teacher_prompts=tuple(r.teacher_prompt or r.prompt for r in rollouts),
        completion_ids=ids,
        completion_mask=mask,
        advantages=advantages,
        policy_weights=config.policy_coef * policy_weights,
        distill_weights=distill_weights,
        sampler_logprobs=pad_sequence(drawn, batch_first=True, padding_value=torch.nan),
        hinted=torch.tensor([r.hinted for r in rollouts]),
        teacher=torch.tensor(taught),
        mini=mini,
    )


def _dealt_out(sizes: Sequence[int], count: int) -> Tensor:
    """(B,) int64 number of the mini-batch of each completion, for questions with these numbers of
    completions."""
    return torch.arange(len(sizes)).remainder(count).repeat_interleave(torch.tensor(sizes))


def _weights(
    mask: Tensor, gate: Tensor, mini: Tensor, from_data: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """(B, T) weights of the policy term and of the divergence, each mini-batch's by itself."""
    policy, distillation = torch.zeros((2, *mask.shape), dtype=torch.float64)
    for number in mini.unique():
        own = mini == number
        if config.policy_reduction == "dr_grpo":
            policy[own] = dr_grpo_weights(mask[own], config.max_completion_length)
        else:
            policy[own] = loss_weights(mask[own], None, config.policy_reduction)
        weights = loss_weights(mask[own], gate[own], config.distill_reduction)
        distillation[own] = _shared_out(weights, from_data[own], config.data_weight)
    return policy, distillation


def _shared_out(weights: Tensor, from_data: Tensor, share: float | None) -> Tensor:
    """Return the weights (B, T) with this share of their sum on the dataset's completions; as they
    are if share is None, or if all their sum is on one side."""
    data, whole = weights[from_data].sum(), weights.sum()
    if share is None or data == 0 or data == whole:
        return weights
    factors = torch.where(from_data, share * whole / data, (1 - share) * whole / (whole - data))
    return weights * factors[:, None]


def gates(rollouts: Sequence[Rollout], config: ObjectiveConfig) -> Tensor:
    """Return (B,) fp32: how much each completion is distilled on, by its quality; 1 where the
    teacher sees a hint."""
    if not config.distils:
        return torch.zeros(len(rollouts))
    if config.gate_reward is None:
        return torch.ones(len(rollouts))
    quality = torch.tensor([reward_of(r, config.gate_reward, config) for r in rollouts])
    gate = quality_gate(quality, config.gate_threshold, config.gate_side)
    return torch.where(torch.tensor([r.teacher_hint is not None for r in rollouts]), 1.0, gate)
