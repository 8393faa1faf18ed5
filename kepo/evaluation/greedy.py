"""Greedy accuracy by modality or type of question; its split into in-domain and out-of-domain.

python -m kepo evaluate MODEL DATA    # of a saved model, with intervals and chance; see --help
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from kepo.data.load import Example
from kepo.distributed.processes import batches_of, rank_slice, split_work
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.sampling import SamplingParams
from kepo.rollout.prompts import prompt_of
from kepo.rollout.sampler import Sampler
from kepo.tasks.task import Task


def evaluate(
    sampler: Sampler,
    examples: Sequence[Example],
    task: Task,
    *,
    max_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> dict[str, list[float]]:
    """Return for each example 1.0 if its greedy answer is right, else 0.0; by modality in order of
    first sight.

    Draws no random numbers. All ranks call, each answers its share, and all get the whole.
    progress: show a bar. stop: called after every batch on each rank; once it is true on one,
    Stopped is raised on all. Raises KepoDataError if there are no examples.
    """
    texts = greedy_answers(
        sampler,
        examples,
        task,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=progress,
        stop=stop,
    )
    scores: dict[str, list[float]] = {}
    for example, text in zip(examples, texts, strict=True):
        scores.setdefault(example.modality, []).append(float(task.is_right(text, example)))
    return scores


def greedy_answers(
    sampler: Sampler,
    examples: Sequence[Example],
    task: Task,
    *,
    max_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> list[str]:
    """Return the model's answer to each example, in their order; otherwise as `evaluate`."""
    if not examples:
        raise KepoDataError("evaluate: examples is empty; expected at least one")
    if batch_size < 1:
        raise KepoConfigError(f"evaluate: batch_size is {batch_size}; expected a number >= 1")
    bar = tqdm(total=len(rank_slice(examples)), desc="eval", disable=not progress)

    def work(batch: Sequence[Example]) -> list[str]:
        ids, mask, _ = sampler.sample(
            [prompt_of(task, example) for example in batch],
            SamplingParams(max_tokens=max_tokens, temperature=0.0),
        )
        bar.update(len(batch))
        return sampler.encoder.decode(ids, mask)

    with bar:
        return split_work(
            examples, work, batches_of(batch_size), collective=sampler.collective, stop=stop
        )


def by_question_type(
    examples: Sequence[Example], scores: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Return the scores that `evaluate` gave these same examples, by type of question instead."""
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
