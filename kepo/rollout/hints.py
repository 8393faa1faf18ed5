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
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from kepo.data.load import Example
from kepo.distributed.processes import batches_of, split_work
from kepo.models.encoding import Encoder
from kepo.models.sampling import SamplingParams, Written
from kepo.rollout.models import Models
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.rollout.questions import seed_of
from kepo.rollout.rollouts import sample
from kepo.rollout.types import Group, Rollout, reward_of, tokens_of, total_reward
from kepo.sections import HintConfig
from kepo.tasks.environment import Environment
from kepo.tasks.task import Task, errors_of
from kepo.teachers.several import Teacher, Teachers, each_of, place_of

MAX_HINT_LENGTH = 256

Hints = dict[str, str | None]
"""The hint that the teacher wrote, by example id; None where nothing it wrote was usable."""


@dataclass(frozen=True)
class RescueReport:
    """Counts of what calls to `rescue` did."""

    groups: int = 0
    """The number of groups that hints were asked for."""
    written: int = 0
    """The number of questions the teacher wrote a hint for; the hints of the others were known from
    an earlier step."""
    retried: int = 0
    """The number of hints the teacher wrote again because the one before was unusable."""
    hint_tokens: int = 0
    """The number of tokens the teacher wrote for hints, unusable ones included."""
    unhinted: int = 0
    """The number of groups for which there was no usable hint."""
    rescued: int = 0
    """The number of groups that received at least one success."""
    attempts: int = 0
    """The number of rounds of sampling with hints, over all groups."""
    sampled: int = 0
    """The number of completions sampled with a hint."""
    tokens: int = 0
    """The number of their tokens."""
    successes: int = 0
    """The number of completions sampled with a hint that succeeded."""
    accepted: int = 0
    """The number of successes that replaced a failure."""

    def __add__(self, other: RescueReport) -> RescueReport:
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        return RescueReport(*sums)


def rescue(
    groups: Sequence[Group],
    models: Models,
    env: Environment,
    config: HintConfig,
    hints: Hints,
    stream: tuple[object, ...] = (),
) -> tuple[list[Group], RescueReport]:
    """Return the groups; in those that get hints (`_gets_hint`), up to ``num_hinted`` failures are
    replaced by completions that succeeded with a hint, or without one if ``hint_for`` is nobody. If
    it is the teacher, their failures are given prompts for it, with the hint.

    Each of at most ``max_attempts`` rounds draws ``num_hinted`` completions for the groups that
    still lack successes, and for those only. Other groups are returned unchanged; no input list is
    changed. ``hints`` holds what the teacher wrote so far, and is added to. ``stream`` names the
    random numbers of `sample` and of hints that are written again.
    """
    groups = [list(group) for group in groups]
    room = {place: _room(group, config) for place, group in enumerate(groups)}
    helped = [
        place for place, group in enumerate(groups) if room[place] and _gets_hint(group, config)
    ]
    if not helped:
        return groups, RescueReport()
    asked = {place: groups[place][0].example for place in helped}
    learnt = RescueReport(groups=len(helped))
    hint_of: dict[int, str | None] = dict.fromkeys(helped)
    if config.hints:
        learnt += _learn_hints(models.teacher, [*asked.values()], env.task, config, hints, stream)
        hint_of = {place: hint for place in helped if (hint := hints[asked[place].id])}
    learnt += RescueReport(unhinted=len(helped) - len(hint_of))
    if config.hint_for == "teacher":
        for place, hint in hint_of.items():
            groups[place] = [_taught_with(hint, r, env.task, config) for r in groups[place]]
        return groups, learnt
    found: dict[int, Group] = {place: [] for place in hint_of}
    attempts = sampled = tokens = successes = 0
    for attempt in range(config.max_attempts):
        lacking = [place for place in hint_of if len(found[place]) < room[place]]
        if not lacking:
            break
        tries = sample(
            models.sampler,
            [asked[place] for place in lacking],
            env,
            config,
            num_generations=config.num_hinted,
            stream=(*stream, "hinted", attempt),
            hints=[hint_of[place] for place in lacking],
        )
        attempts += len(lacking)
        sampled += len(lacking) * config.num_hinted
        tokens += tokens_of(tries)
        for place, group in zip(lacking, tries, strict=True):
            good = [rollout for rollout in group if succeeds(rollout, config)]
            successes += len(good)
            found[place] = (found[place] + good)[: room[place]]
    for place, good in found.items():
        groups[place] = replace_worst(groups[place], good, config)
    return groups, learnt + RescueReport(
        rescued=sum(bool(good) for good in found.values()),
        attempts=attempts,
        sampled=sampled,
        tokens=tokens,
        successes=successes,
        accepted=sum(map(len, found.values())),
    )


def all_failed(group: Group, config: HintConfig) -> bool:
    """Return whether no sample of the group reaches ``hint_threshold`` on ``hint_reward``."""
    return all(reward_of(r, config.hint_reward, config) < config.hint_threshold for r in group)


def succeeds(rollout: Rollout, config: HintConfig) -> bool:
    """Return whether a completion may be trained on as a success.

    It reaches ``accept_threshold`` on ``accept_reward``, was not cut off, and does not mention a
    hint: the plain question has none.
    """
    good = reward_of(rollout, config.accept_reward, config) >= config.accept_threshold
    return good and not rollout.truncated and "hint" not in rollout.text.lower()


class WrittenHint(NamedTuple):
    """What a teacher wrote for one example."""

    text: str | None
    """The hint; None where what was written is unusable (`usable`)."""
    tokens: int
    """The number of tokens that were written."""


def write_hints(
    teacher: Teacher,
    examples: Sequence[Example],
    task: Task,
    config: HintConfig,
    stream: tuple[object, ...] | None = None,
) -> list[WrittenHint]:
    """Write one hint per example.

    stream: None writes greedily; otherwise the teacher writes at ``hint_temperature``, with
    separate random numbers for each (seed, stream, id of the example), so the other examples change
    nothing but rounding.
    """

    params = SamplingParams(
        max_tokens=min(MAX_HINT_LENGTH, config.max_completion_length),
        temperature=0.0 if stream is None else config.hint_temperature,
    )

    def work(some: Sequence[Example]) -> list[Written]:
        return teacher.write(
            [hint_prompt(task, one, with_answer=config.hint_with_answer) for one in some],
            params,
            seeds=None
            if stream is None
            else [seed_of(config.seed, *stream, example.id) for example in some],
        )

    written = split_work(
        examples, work, batches_of(config.rollout_batch), collective=teacher.collective
    )
    encoder = teacher.encoder
    found = []
    for (text, tokens), example in zip(written, examples, strict=True):
        with errors_of(task, example):
            hint = task.hint_of(text)
        good = usable(hint, example, task, config, encoder)
        found.append(WrittenHint(hint if good else None, tokens))
    return found


def usable(
    hint: str | None, example: Example, task: Task, config: HintConfig, encoder: Encoder
) -> bool:
    """Return whether a hint may stand in a prompt.

    It was written whole, between one pair of tags; it holds no control tokens, which would end the
    turn it stands in; and it does not give the answer away (`Task.gives_away`), unless
    ``leak_filter`` is off or the student is told the answer anyway.
    """
    if hint is None or encoder.control_tokens_in(hint):
        return False
    filtered = config.leak_filter and not config.hint_gives_answer
    with errors_of(task, example):
        return not (filtered and task.gives_away(hint, example))


def replace_worst(group: Group, successes: Group, config: HintConfig) -> Group:
    """Return the group with its lowest-reward failures (later ones first among equals) replaced,
    each once."""
    failures = [place for place, rollout in enumerate(group) if not succeeds(rollout, config)]
    failures.sort(key=lambda place: (total_reward(group[place], config), -place))
    group = list(group)
    for place, success in zip(failures, successes, strict=False):
        group[place] = success
    return group


def _taught_with(hint: str | None, rollout: Rollout, task: Task, config: HintConfig) -> Rollout:
    """Return the completion with the prompt in which its teacher sees the hint; as it is if it
    succeeds. (Privileged teachers: PTD-PO, arXiv 2606.07000.)"""
    if succeeds(rollout, config):
        return rollout
    shown = prompt_of(task, rollout.example, hint, gives_answer=config.hint_gives_answer)
    return replace(rollout, teacher_hint=hint, teacher_prompt=shown)


def _gets_hint(group: Group, config: HintConfig) -> bool:
    """Return whether the group gets a hint, as ``hint_trigger`` says."""
    return config.hint_trigger == "always" or all_failed(group, config)


def _room(group: Group, config: HintConfig) -> int:
    """Return how many samples of the group hinted successes may replace."""
    return min(config.num_hinted, sum(not succeeds(rollout, config) for rollout in group))


def _learn_hints(
    teachers: Teachers,
    examples: Sequence[Example],
    task: Task,
    config: HintConfig,
    hints: Hints,
    stream: tuple[object, ...],
) -> RescueReport:
    """Let each teacher write hints for those of its examples that have none yet: it is frozen, so
    they stay valid. Returns the counts of what they wrote."""
    report = RescueReport()
    for place, teacher in enumerate(each_of(teachers)):
        own = [example for example in examples if place_of(example, config) == place]
        report += _learn_from(teacher, own, task, config, hints, stream)
    return report


def _learn_from(
    teacher: Teacher,
    examples: Sequence[Example],
    task: Task,
    config: HintConfig,
    hints: Hints,
    stream: tuple[object, ...],
) -> RescueReport:
    """Write hints for the examples that have none yet.

    The first hint is greedy; an unusable one is asked for again at most ``hint_retries`` times, at
    ``hint_temperature``. One that stays unusable is recorded as None, and not asked for again.
    """
    lacking = [*{e.id: e for e in examples if e.id not in hints}.values()]
    report = RescueReport(written=len(lacking))
    for attempt in range(1 + config.hint_retries):
        if not lacking:
            break
        again = ((*stream, "hint", attempt - 1),) if attempt else ()
        found = write_hints(teacher, lacking, task, config, *again)
        hints |= {example.id: one.text for example, one in zip(lacking, found, strict=True)}
        tokens = sum(one.tokens for one in found)
        report += RescueReport(retried=len(lacking) if attempt else 0, hint_tokens=tokens)
        lacking = [example for example in lacking if hints[example.id] is None]
    return report
