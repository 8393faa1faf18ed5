"""The completions of a step: sampled, rescued, and sampled again for groups with equal rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kepo.data.load import Example
from kepo.rollout.hints import Hints, RescueReport, rescue
from kepo.rollout.models import Models
from kepo.rollout.questions import draw
from kepo.rollout.rollouts import sample
from kepo.rollout.types import Group, reward_of, tokens_of
from kepo.sections import HintConfig
from kepo.tasks.environment import Environment


@dataclass
class Exploration:
    """Groups of one size, and counts of what it took to get them."""

    groups: list[Group] = field(default_factory=list)
    report: RescueReport = field(default_factory=RescueReport)
    asked: int = 0
    """The number of groups sampled, those of exchanged questions included."""
    resampled: int = 0
    """The number of groups whose question was exchanged for another."""
    sampled: int = 0
    """The number of completions sampled in all, those with a hint included."""
    sampled_tokens: int = 0
    """The number of their tokens."""
    rollout_seconds: float = 0.0
    hint_seconds: float = 0.0


def explore(
    questions: Sequence[Example],
    models: Models,
    env: Environment,
    config: HintConfig,
    hints: Hints,
    examples: Sequence[Example],
    step: int,
) -> Exploration:
    """Sample ``num_generations`` completions for each question, rescued by hints as `rescue` says.

    With ``dynamic_sampling`` a group of equal rewards (`is_dull`) is replaced by the group of
    another of the ``examples``, if that is of unequal ones; at most ``dynamic_sampling`` times.
    (DAPO, Yu et al. 2025, where the reward is the accuracy.)
    """
    found = Exploration()

    def answered(questions: Sequence[Example], extra_round: int = 0) -> list[Group]:
        started = time.perf_counter()
        stream = (step, extra_round)
        count = config.num_generations
        groups = sample(
            models.sampler, questions, env, config, num_generations=count, stream=stream
        )
        sampled = time.perf_counter()
        found.sampled_tokens += tokens_of(groups)
        if config.rescues:
            groups, report = rescue(groups, models, env, config, hints, stream)
            found.report += report
            found.sampled += report.sampled
            found.sampled_tokens += report.tokens
        found.asked += len(groups)
        found.sampled += len(groups) * config.num_generations
        found.rollout_seconds += sampled - started
        found.hint_seconds += time.perf_counter() - sampled
        return groups

    found.groups = answered(questions) if questions else []
    for extra_round in range(1, config.dynamic_sampling + 1):
        dull = [place for place, group in enumerate(found.groups) if is_dull(group, config)]
        if not dull:
            break
        others = answered(draw(examples, config, step, extra_round)[: len(dull)], extra_round)
        lively = [group for group in others if not is_dull(group, config)]
        for place, group in zip(dull, lively, strict=False):
            found.groups[place] = group
        found.resampled += len(lively)
    return found


def is_dull(group: Group, config: HintConfig) -> bool:
    """Return whether the ``dynamic_reward`` of all samples of a group is equal."""
    rewards = torch.tensor([reward_of(r, config.dynamic_reward, config) for r in group])
    return bool((rewards == rewards[0]).all())
