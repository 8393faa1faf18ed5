"""Sample completions with the live policy, or take the dataset's own, and score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kepo.data.load import Example
from kepo.distributed.processes import split_work
from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import Sampled, SamplingParams
from kepo.rollout.prompts import prompt_of, worked_answer
from kepo.rollout.questions import seed_of
from kepo.rollout.sampler import Sampler
from kepo.rollout.types import Group, Rollout
from kepo.sections import HintConfig, RewardConfig, SamplingConfig
from kepo.tasks.environment import Environment
from kepo.tasks.task import Task


def sample(
    sampler: Sampler,
    examples: Sequence[Example],
    env: Environment,
    config: HintConfig,
    *,
    num_generations: int,
    stream: tuple[object, ...] = (),
    hints: Sequence[str | None] | None = None,
) -> list[Group]:
    """Sample ``num_generations`` scored completions for each example, in the order of the examples.

    All ranks call it with the same examples; each samples its share, and all get the whole. stream:
    names the random numbers; with ``config.seed`` and the places of example and completion, it
    gives the same completion however the work is shared out. hints: one per example, shown with the
    question; None shows none. The rewards of ``env`` are called once, on what this rank has
    sampled. ``config`` gives length limit, temperature, top_p, and how much is generated at once.
    """
    told: Sequence[str | None] = [None] * len(examples) if hints is None else hints
    asked = [
        _Asked(
            place,
            example,
            hint,
            prompt_of(env.task, example, hint, gives_answer=config.hint_gives_answer),
        )
        for place, (example, hint) in enumerate(zip(examples, told, strict=True))
    ]

    params = SamplingParams(
        n=num_generations,
        max_tokens=config.max_completion_length,
        temperature=config.sampling_temperature,
        top_p=config.top_p,
    )

    def work(some: Sequence[_Asked]) -> list[tuple[int, Group]]:
        sampled = sampler.sample(
            [one.shown for one in some],
            params,
            seeds=[
                seed_of(config.seed, *stream, one.place, number)
                for one in some
                for number in range(num_generations)
            ],
        )
        groups = _rollouts(some, sampled, sampler.encoder, env.task, num_generations)
        return [(one.place, group) for one, group in zip(some, groups, strict=True)]

    def scored(mine: list[tuple[int, Group]]) -> list[tuple[int, Group]]:
        judge([rollout for _, group in mine for rollout in group], env)
        return mine

    def portions(share: Sequence[_Asked]) -> Sequence[Sequence[_Asked]]:
        return _portions(share, sampler.encoder, config, num_generations)

    found = dict(split_work(asked, work, portions, collective=sampler.collective, finish=scored))
    return [found[one.place] for one in asked]


class _Asked(NamedTuple):
    place: int
    example: Example
    hint: str | None
    shown: Prompt
    """The question, with the hint if there is one."""


def _portions(
    share: Sequence[_Asked], encoder: Encoder, config: SamplingConfig, num_generations: int
) -> Sequence[Sequence[_Asked]]:
    """Cut the share, in order of length, into what ``rollout_batch`` and ``rollout_tokens`` let be
    generated at once; a single question always may. The shortest come first."""
    most, tokens = max(1, config.rollout_batch // num_generations), config.rollout_tokens
    if tokens is None and len(share) <= most:
        return [share]
    tokens_of = encoder.lengths([one.shown for one in share])
    lengths = {one.place: length for one, length in zip(share, tokens_of, strict=True)}
    portions: list[list[_Asked]] = []
    for one in sorted(share, key=lambda one: lengths[one.place]):
        count = len(portions[-1]) + 1 if portions else 1
        padded = lengths[one.place] + config.max_completion_length  # of every sequence
        full = tokens is not None and count * num_generations * padded > tokens
        if not portions or count > most or full:
            portions.append([])
        portions[-1].append(one)
    return portions


def _rollouts(
    asked: Sequence[_Asked],
    sampled: Sampled,
    encoder: Encoder,
    task: Task,
    num_generations: int,
) -> list[Group]:
    """Return what was sampled for each question, without rewards yet."""
    ids, mask, logprobs = sampled
    texts = encoder.decode(ids, mask)
    ended = (torch.isin(ids, torch.tensor(encoder.end_ids)) & mask).any(-1).tolist()
    plain = [prompt_of(task, one.example) for one in asked]
    groups: list[Group] = [[] for _ in asked]
    for row, text in enumerate(texts):
        place = row // num_generations
        one = asked[place]
        groups[place].append(
            Rollout(
                example=one.example,
                prompt=plain[place],
                completion_ids=ids[row][mask[row]],
                text=text,
                sampler_logprobs=logprobs[row][mask[row]],
                hint=one.hint,
                truncated=not ended[row],
            )
        )
    return groups


def demonstrations(
    encoder: Encoder, examples: Sequence[Example], env: Environment, config: RewardConfig
) -> list[Rollout]:
    """Return the dataset's own worked solution of each example, as a scored completion."""
    if not examples:
        return []
    texts = [worked_answer(env.task, example) for example in examples]
    ids, mask = encoder.encode_completions(texts)
    limit = config.max_completion_length
    rollouts = []
    cut = encoder.decode(ids[:, :limit], mask[:, :limit])  # what is trained on is what is judged
    for row, example in enumerate(examples):
        tokens = ids[row][mask[row]]
        kept = tokens[:limit]
        rollouts.append(
            Rollout(
                example=example,
                prompt=prompt_of(env.task, example),
                completion_ids=kept,
                text=cut[row],
                truncated=len(tokens) > limit,
            )
        )
    judge(rollouts, env)
    return rollouts


def judge(rollouts: Sequence[Rollout], env: Environment) -> None:
    """Give the rollouts their rewards."""
    rewards = env.scores(
        [rollout.example for rollout in rollouts],
        [rollout.text for rollout in rollouts],
        [rollout.completion_ids.tolist() for rollout in rollouts],
    )
    for rollout, reward in zip(rollouts, rewards, strict=True):
        rollout.rewards = reward
