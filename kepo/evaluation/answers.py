"""The answers of a model to questions: greedy ones, or several samples of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from kepo.data.example import Example
from kepo.distributed.processes import batches_of, rank_slice, split_work
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.sampling import SamplingParams
from kepo.rollout.prompts import prompt_of
from kepo.rollout.questions import seed_of
from kepo.rollout.sampler import Sampler
from kepo.tasks.task import Task, errors_of


class Said(NamedTuple):
    """One completion."""

    text: str
    ids: list[int]
    """Its tokens."""


def answers_of(
    sampler: Sampler,
    examples: Sequence[Example],
    task: Task,
    params: SamplingParams,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> list[list[Said]]:
    """Return ``params.n`` completions of each question, in their order.

    All ranks call, each answers its share, and all get the whole. A completion depends on ``seed``,
    its question's place and its own number; greedy ones draw no random numbers.
    batch_size: completions generated at once. progress: show a bar. stop: called after every batch
    on each rank; once it is true on one, Stopped is raised on all. Raises KepoDataError if there
    are no examples.
    """
    if not examples:
        raise KepoDataError("answers_of: examples is empty; expected at least one")
    if batch_size < 1:
        raise KepoConfigError(f"answers_of: batch_size is {batch_size}; expected a number >= 1")
    asked = list(enumerate(examples))
    bar = tqdm(total=len(rank_slice(asked)), desc="eval", disable=not progress)

    def work(batch: Sequence[tuple[int, Example]]) -> list[list[Said]]:
        seeds = [
            seed_of(seed, "evaluation", place, n) for place, _ in batch for n in range(params.n)
        ]
        prompts = [prompt_of(task, example) for _, example in batch]
        ids, mask, _ = sampler.sample(prompts, params, None if params.greedy else seeds)
        texts = sampler.encoder.decode(ids, mask)
        said = [
            Said(text, row[keep].tolist()) for text, row, keep in zip(texts, ids, mask, strict=True)
        ]
        bar.update(len(batch))
        return [said[start : start + params.n] for start in range(0, len(said), params.n)]

    at_once = batches_of(max(1, batch_size // params.n))
    with bar:
        return split_work(asked, work, at_once, collective=sampler.collective, stop=stop)


def greedy_scores(
    sampler: Sampler,
    examples: Sequence[Example],
    task: Task,
    *,
    max_tokens: int,
    batch_size: int = 64,
    stop: Callable[[], bool] | None = None,
) -> dict[str, list[float]]:
    """Return for each example 1.0 if its greedy answer is right, else 0.0; by modality in order of
    first sight. All ranks call, as of `answers_of`."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    said = answers_of(sampler, examples, task, params, batch_size=batch_size, stop=stop)
    scores: dict[str, list[float]] = {}
    for example, [answer] in zip(examples, said, strict=True):
        with errors_of(task, example):
            right = float(bool(task.is_right(answer.text, example)))
        scores.setdefault(example.modality, []).append(right)
    return scores


def by_question_type(
    examples: Sequence[Example], scores: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Return the scores that `greedy_scores` gave these same examples, by type of question."""
    left = {modality: iter(values) for modality, values in scores.items()}
    types: dict[str, list[float]] = {}
    for example in examples:
        types.setdefault(example.question_type, []).append(next(left[example.modality]))
    assert all(next(values, None) is None for values in left.values()), "other examples"
    return types


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the accuracy of each modality, or type of question."""
    return {name: sum(values) / len(values) for name, values in scores.items()}


def summary(table: Mapping[str, float], source: str) -> tuple[float, float]:
    """Return ``(in_domain, ood_mean)``: accuracy on ``source`` and the plain mean over the others.

    Every other modality counts the same, whatever its number of questions. Raises KepoDataError if
    source is not in the table or there is no other modality.
    """
    others = [value for modality, value in table.items() if modality != source]
    if source not in table or not others:
        raise KepoDataError(
            f"summary: source={source!r}, table has {sorted(table)}; expected source among them "
            "and at least one other modality"
        )
    return table[source], sum(others) / len(others)
