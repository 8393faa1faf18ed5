"""Rollout, the record of one completion; groups of them; and their total rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kepo.config import TOTAL
from kepo.data.example import Example
from kepo.models.encoding import Prompt
from kepo.sections import RewardConfig


@dataclass
class Rollout:
    """One completion of a question: its tokens, its rewards, and how it was sampled."""

    example: Example
    prompt: Prompt
    """The plain question. The completion is trained on as an answer to this prompt, also if it was
    sampled with a hint."""
    completion_ids: Tensor
    """(T,) int64 sampled tokens, the end token included."""
    text: str
    rewards: dict[str, float]
    sampler_logprobs: Tensor | None = None
    """(T,) fp32 log-probabilities under the law they were drawn from, prompt and hint included.
    None if it was not sampled."""
    hint: str | None = None
    """The hint that stood in the prompt beside the question; None if there was none."""
    truncated: bool = False
    """True if the completion reached the length limit before its end token."""

    @property
    def hinted(self) -> bool:
        return self.hint is not None


Group = list[Rollout]


def tokens_of(groups: Sequence[Group]) -> int:
    """Return the number of completion tokens in all groups."""
    return sum(len(rollout.completion_ids) for group in groups for rollout in group)


def total_reward(rollout: Rollout, config: RewardConfig) -> float:
    """Return the weighted sum of a rollout's rewards, less the penalty for an overlong one."""
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    total = sum(weight * rollout.rewards[name] for name, weight in pairs)
    return total + rollout.rewards.get("overlong", 0.0)


def reward_of(rollout: Rollout, name: str, config: RewardConfig) -> float:
    """Return the reward of that name, or the total."""
    return total_reward(rollout, config) if name == TOTAL else rollout.rewards[name]


def total_rewards(groups: Sequence[Group], config: RewardConfig) -> Tensor:
    """Return (P, G) fp32 total rewards of groups of one size."""
    rewards = [[total_reward(rollout, config) for rollout in group] for group in groups]
    return torch.tensor(rewards).reshape(len(groups), -1)
