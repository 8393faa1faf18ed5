"""Rescue groups in which every sample failed, with a hint from the teacher.

A group whose rewards are all equal has no advantage and teaches nothing: on the prompts the policy
cannot solve at all, exploration alone stands still. There the teacher writes a hint, the policy
samples again with the hint in its prompt, and completions that succeed take the places of the worst
ones. They are scored, trained on and distilled under the plain question, as if the policy had found
them by itself. (KEPO, arXiv 2602.00400, section on knowledge-enhanced exploration; acceptance is
per sample, and nothing happens to groups that need no help.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kepo.config import Config
from kepo.data import Example
from kepo.prompts import hint_request, hinted_prompt, parse_hint
from kepo.rollout import Group, sample, total_reward
from kepo.vlm import VLM, Prompt

MAX_HINT_LENGTH = 256


@dataclass(frozen=True)
class RescueReport:
    """What a call to `rescue` did, in counts."""

    failed: int = 0
    """Groups in which every sample failed."""
    unhinted: int = 0
    """Of those, the ones for which the teacher gave no usable hint."""
    rescued: int = 0
    """Groups that received at least one success."""
    attempts: int = 0
    """Rounds of sampling with hints, over all groups."""
    sampled: int = 0
    """Completions sampled with a hint."""
    accepted: int = 0
    """Of those, the ones that replaced a failure."""


def rescue(
    groups: Sequence[Group], policy: VLM, teacher: VLM, config: Config
) -> tuple[list[Group], RescueReport]:
    """The groups, with up to ``num_hinted`` hinted successes in each that had failed entirely.

    A sample fails when its reward ``hint_reward`` is below ``hint_threshold``. Each of at most
    ``max_attempts`` rounds draws as many completions as a group still lacks, for those groups only.
    Groups that had a success are returned as they came; no input list is changed.
    """
    groups = [list(group) for group in groups]
    failed = [place for place, group in enumerate(groups) if all_failed(group, config)]
    if not failed or config.num_hinted == 0:
        return groups, RescueReport(failed=len(failed))
    hints = write_hints(teacher, [groups[place][0].example for place in failed], config)
    hint_of = {place: hint for place, hint in zip(failed, hints, strict=True) if hint is not None}
    found: dict[int, Group] = {place: [] for place in hint_of}
    attempts = sampled = 0
    for _ in range(config.max_attempts):
        lacking = [place for place in hint_of if len(found[place]) < config.num_hinted]
        if not lacking:
            break
        by_id = {groups[place][0].example.id: hint_of[place] for place in lacking}
        tries = sample(
            policy,
            [groups[place][0].example for place in lacking],
            config,
            num_generations=config.num_hinted,
            prompt=lambda example, by_id=by_id: hinted_prompt(example, by_id[example.id]),
            hinted=True,
        )
        attempts += len(lacking)
        sampled += len(lacking) * config.num_hinted
        for place, group in zip(lacking, tries, strict=True):
            successes = [r for r in group if r.rewards[config.hint_reward] >= config.hint_threshold]
            found[place] = (found[place] + successes)[: config.num_hinted]
    for place, successes in found.items():
        groups[place] = replace_worst(groups[place], successes, config)
    return groups, RescueReport(
        failed=len(failed),
        unhinted=len(failed) - len(hint_of),
        rescued=sum(bool(successes) for successes in found.values()),
        attempts=attempts,
        sampled=sampled,
        accepted=sum(map(len, found.values())),
    )


def all_failed(group: Group, config: Config) -> bool:
    """Whether no sample of the group reaches ``hint_threshold`` on ``hint_reward``."""
    return all(r.rewards[config.hint_reward] < config.hint_threshold for r in group)


def write_hints(teacher: VLM, examples: Sequence[Example], config: Config) -> list[str | None]:
    """One greedy hint per example; None where the teacher's text holds no well-formed hint."""
    requests = [
        Prompt(hint_request(example, with_answer=config.hint_with_answer), example.image)
        for example in examples
    ]
    ids, mask = teacher.generate(
        teacher.encode(requests),
        max_new_tokens=min(MAX_HINT_LENGTH, config.max_completion_length),
        temperature=0.0,
    )
    return [parse_hint(text) for text in teacher.decode(ids, mask)]


def replace_worst(group: Group, successes: Group, config: Config) -> Group:
    """The group with its lowest-reward samples (later ones first among equals) replaced, each
    once."""
    order = sorted(
        range(len(group)), key=lambda place: (total_reward(group[place], config), -place)
    )
    group = list(group)
    for place, success in zip(order, successes, strict=False):
        group[place] = success
    return group
