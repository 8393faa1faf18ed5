"""Rollout, the record of one completion; groups of them; and their total rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kepo.config import TOTAL
from kepo.data.example import Example
from kepo.models.encoding import Prompt
from kepo.sections import RewardConfig
from kepo.tasks.rewards import reward_name


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
    rewards: dict[str, float | None] = field(default_factory=dict)
    """The rewards by name; None where one does not apply to this completion."""
    sampler_logprobs: Tensor | None = None
    """(T,) fp32 log-probabilities under the law they were drawn from, prompt and hint included.
    None if it was not sampled."""
    hint: str | None = None
    """The hint that stood in the prompt beside the question; None if there was none."""
    teacher_hint: str | None = None
    """The hint that the teacher alone sees; None if there is none."""
    teacher_prompt: Prompt | None = None
    """The question with that hint: what the teacher is distilled from under. None: ``prompt``."""
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
    """Return the weighted sum of the rewards that apply to a rollout."""
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    each = [(rollout.rewards[reward_name(name)], weight) for name, weight in pairs]
    return sum((weight * reward for reward, weight in each if reward is not None), 0.0)


def reward_of(rollout: Rollout, name: str, config: RewardConfig) -> float:
    """Return the reward of that name, or the total; -inf if it does not apply, which reaches no
    threshold."""
    if name == TOTAL:
        return total_reward(rollout, config)
    reward = rollout.rewards[reward_name(name)]
    return -math.inf if reward is None else reward


def total_rewards(groups: Sequence[Group], config: RewardConfig) -> Tensor:
    """Return (P, G) fp32 total rewards of groups of one size."""
    rewards = [[total_reward(rollout, config) for rollout in group] for group in groups]
    return torch.tensor(rewards).reshape(len(groups), -1)
