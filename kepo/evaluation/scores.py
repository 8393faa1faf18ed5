"""Scores: the table of an evaluation, by modality and type of question, with intervals.

Of several samples of a question, ``pass@k`` is the chance that one of k is right, estimated without
bias from all of them, and ``maj@k`` the chance that the answer most of k give is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kepo.data.example import Example
from kepo.evaluation.answers import Said
from kepo.evaluation.statistics import Interval, pass_at_k, students_t, wilson
from kepo.tasks.task import Task, errors_of


@dataclass(frozen=True)
class Answered:
    """A question with the model's completions, and how they are judged."""

    example: Example
    texts: tuple[str, ...]
    right: tuple[bool, ...]
    parsed: tuple[bool, ...]
    """False where no answer can be read from a completion."""
    rewards: tuple[Mapping[str, float | None], ...]
    """The rewards of each completion by name; None where one does not apply."""
    votes: Mapping[int, float]
    """``maj@k`` of this question, by k."""
    chance: float
    """The probability that blind guessing is right."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found. A part of the questions is a dict: ``questions``, ``right``,
    ``unparsed``, ``accuracy`` with its 95 % interval ``low`` and ``high``, and ``chance``; of
    several samples also ``pass@k`` and ``maj@k``; and ``rewards`` by name. As text it is the table.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    """Counts of what was read and left out."""
    overall: dict[str, Any]
    """The part that is all questions."""
    macro_mean: dict[str, float]
    """Accuracy and chance as means over modalities, each counting the same."""
    modalities: dict[str, dict[str, Any]]
    question_types: dict[str, dict[str, Any]]
    cells: list[dict[str, Any]]
    """Parts of one modality and type of question each."""
    answers: list[Answered]
    """Every question, in order, with its completions."""

    @property
    def accuracy(self) -> float:
        return self.overall["accuracy"]

    def record(self) -> dict[str, Any]:
        """Return plain values: all but the answers."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "answers"}

    def __str__(self) -> str:
        return "\n".join(lines(self))


# ---- one question ----


def judged(
    task: Task,
    example: Example,
    said: Sequence[Said],
    rewards: Sequence[Mapping[str, float | None]] = (),
) -> Answered:
    """Return how a task judges the completions of a question; ``rewards`` are already known."""
    texts = tuple(one.text for one in said)
    with errors_of(task, example):
        answers = [task.answer_of(text) for text in texts]
        right = tuple(bool(task.is_right(text, example)) for text in texts)
        votes = {k: majority(task, answers, right, k) for k in sizes(len(texts))}
        chance = task.chance(example)
    return Answered(
        example,
        texts,
        right,
        parsed=tuple(answer is not None for answer in answers),
        rewards=tuple(rewards),
        votes=votes,
        chance=chance,
    )


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k and maj@k: the powers of two from 2 on, and the number of samples."""
    powers = itertools.takewhile(lambda k: k < samples, (2**n for n in itertools.count(1)))
    return [*powers, samples] if samples > 1 else []


def majority(task: Task, answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the share of right votes among the samples, k at a time; those left over do not vote.

    Answers that the task calls the same are one, and a completion without an answer has no vote.
    Where several answers lead, each wins as often.
    """
    starts = range(0, len(answers) - k + 1, k)
    return sum(_vote(task, answers, right, range(start, start + k)) for start in starts) / len(
        starts
    )


def _vote(
    task: Task, answers: Sequence[str | None], right: Sequence[bool], places: Sequence[int]
) -> float:
    parties: list[list[int]] = []
    for place in places:
        said = answers[place]
        if said is None:
            continue
        same = (party for party in parties if task.same(said, answers[party[0]] or ""))
        party = next(same, None)
        if party is None:
            parties.append([place])
        else:
            party.append(place)
    most = max(map(len, parties), default=0)
    leading = [party for party in parties if len(party) == most]
    return sum(right[party[0]] for party in leading) / len(leading) if leading else 0.0


# ---- parts of the questions ----


def tabulated(answers: Sequence[Answered]) -> dict[str, Any]:
    """Return the fields of `Scores` that are tables."""

    def by(key: Callable[[Example], Any]) -> dict[Any, dict[str, Any]]:
        parts: dict[Any, list[Answered]] = {}
        for answer in answers:
            parts.setdefault(key(answer.example), []).append(answer)
        return {name: summed(parts[name]) for name in sorted(parts)}

    modalities = by(lambda example: example.modality)
    cells = by(lambda example: (example.modality, example.question_type))
    return {
        "overall": summed(answers),
        "macro_mean": {
            name: sum(part[name] for part in modalities.values()) / len(modalities)
            for name in ("accuracy", "chance")
        },
        "modalities": modalities,
        "question_types": by(lambda example: example.question_type),
        "cells": [{"modality": m, "question_type": t, **cell} for (m, t), cell in cells.items()],
    }


def summed(answers: Sequence[Answered]) -> dict[str, Any]:
    """Return the numbers of a part, as `Scores` describes it."""
    samples, count = len(answers[0].texts), len(answers)
    share, low, high = _share([sum(answer.right) / samples for answer in answers])
    found: dict[str, Any] = {
        "questions": count,
        "right": sum(sum(answer.right) for answer in answers),
        "unparsed": sum(not parsed for answer in answers for parsed in answer.parsed),
        "accuracy": share,
        "low": low,
        "high": high,
        "chance": sum(answer.chance for answer in answers) / count,
    }
    if samples > 1:
        found["samples"] = samples
    for k in sizes(samples):
        passed = [pass_at_k(samples, sum(answer.right), k) for answer in answers]
        found[f"pass@{k}"] = _share(passed)._asdict()
        found[f"maj@{k}"] = _share([answer.votes[k] for answer in answers])._asdict()
    names = dict.fromkeys(name for answer in answers for one in answer.rewards for name in one)
    found["rewards"] = {name: _reward(name, answers) for name in names if name != "accuracy"}
    return found


def _share(values: Sequence[float]) -> Interval:
    """Return the mean of numbers from 0 to 1, one per question, with Wilson's interval for as many
    trials. It is exact where each is 0 or 1, and too wide elsewhere: nothing between 0 and 1 varies
    more than a coin of the same mean."""
    return wilson(sum(values), len(values))


def _reward(name: str, answers: Sequence[Answered]) -> dict[str, float | int]:
    """Return a reward's mean over the questions that it applies to, with Student's interval."""
    means = []
    for answer in answers:
        known = [x for one in answer.rewards if (x := one.get(name)) is not None]
        if known:
            means.append(sum(known) / len(known))
    if not means:
        return {"questions": 0}
    return {"questions": len(means), **students_t(means)._asdict()}


# ---- as text ----


def lines(scores: Scores) -> list[str]:
    """Return the table: under each modality its types of question, then all modalities by type."""
    blocks = []
    types = scores.question_types
    for modality, whole in scores.modalities.items():
        cells = [cell for cell in scores.cells if cell["modality"] == modality]
        blocks.append([(modality, "all", whole)])
        if len(cells) > 1 or len(types) > 1:
            blocks[-1] += [("", cell["question_type"], cell) for cell in cells]
    if len(blocks) > 1:
        blocks.append([("all", "all", scores.overall)])
        if len(types) > 1:
            blocks[-1] += [("", name, part) for name, part in types.items()]
    first = max(len(name) for block in blocks for name, _, _ in [("modality", "", {}), *block])
    second = max(
        len(kind) for block in blocks for _, kind, _ in [("", "question type", {}), *block]
    )
    more = _columns(scores.overall)
    found = [
        f"{'modality':{first}}  {'question type':{second}}  questions  accuracy         95 %  "
        f"chance  unparsed{''.join(f'  {name:>8}' for name in more)}"
    ]
    for block in blocks:
        found.append("")
        found += [
            f"{name:{first}}  {kind:{second}}  {part['questions']:9}  {part['accuracy']:8.3f}  "
            f"{part['low']:.3f}-{part['high']:.3f}  {part['chance']:6.3f}  {part['unparsed']:8}"
            + "".join(f"  {_shown(part, name):>{max(8, len(name))}}" for name in more)
            for name, kind, part in block
        ]
    macro = scores.macro_mean
    found.append("")
    found.append(
        f"mean over modalities, each counting the same: {macro['accuracy']:.3f}, chance "
        f"{macro['chance']:.3f}"
    )
    return found


def _columns(part: Mapping[str, Any]) -> list[str]:
    """Return what the table shows beside accuracy: all samples together, and the rewards."""
    samples = part.get("samples", 1)
    return [*([f"pass@{samples}", f"maj@{samples}"] if samples > 1 else []), *part["rewards"]]


def _shown(part: Mapping[str, Any], name: str) -> str:
    found = part["rewards"].get(name) or part.get(name, {})
    return f"{found['mean']:.3f}" if "mean" in found else "-"
