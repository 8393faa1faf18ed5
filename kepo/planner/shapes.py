"""The sizes of what an update computes at once, when every completion is as long as it may be.

The micro-batches are those that the loop itself would lay out (kepo.objective.micros).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kepo.models.encoding import Prompt
from kepo.models.packing import packed_length
from kepo.objective.batch import Batch
from kepo.objective.micros import Micro, plan_micros
from kepo.planner.standing import Machine
from kepo.sections import ObjectiveConfig, OptimizerConfig, SamplingConfig


class Shape(NamedTuple):
    """The rows of one forward, all padded to the longest."""

    rows: int
    length: int
    """Tokens of a row, those of its prompt among them."""
    completions: int
    questions: int
    """The most different prompts among the rows."""

    @classmethod
    def of(cls, micro: Micro, questions: int) -> Shape:
        longest = max(row.tokens for row in micro)
        return cls(
            rows=len(micro),
            length=longest,
            completions=sum(len(row.places) for row in micro),
            questions=min(len(micro), questions),
        )


class Share(NamedTuple):
    """What one process computes in a step."""

    micro: Shape
    """The micro-batch with the most tokens."""
    whole: Shape
    """All completions of the process in one forward."""
    micros: int
    """The number of micro-batches of an optimiser step."""


def share_of(
    config: ObjectiveConfig,
    optimizer: OptimizerConfig,
    machine: Machine,
    prompt_tokens: int,
    shared: bool,
) -> Share:
    """Return what the process with the most tokens computes in a step, and the largest micro-batch
    of any, where all prompts have this many tokens.

    shared: a prompt is computed once for all its completions (`ModelSizes.shares_prompts`).
    """
    questions = config.prompts_per_step // config.mini_batches
    mini = _full(questions, config)
    plan = plan_micros(mini, [prompt_tokens] * len(mini), optimizer, shared, machine.gpus)
    # Rows of one question come in any order, as their completions differ in length.
    shapes = [Shape.of(micro, questions) for own in plan for micro in own]
    wholes = [_whole(own, mini, config, prompt_tokens, shared) for own in plan if own]
    return Share(max(shapes, key=_tokens), max(wholes, key=_tokens), max(map(len, plan)))


def _tokens(shape: Shape) -> tuple[int, int]:
    return shape.rows * shape.length, shape.completions


def _whole(
    own: Sequence[Micro], mini: Batch, config: ObjectiveConfig, prompt_tokens: int, shared: bool
) -> Shape:
    """Return all completions of a process in one forward, from its micro-batches of a mini-batch:
    those of the others are alike."""
    places = [place for micro in own for row in micro for place in row.places]
    group = Counter(mini.prompts[place] for place in places)  # completions, by question
    longest = config.max_completion_length
    whole = packed_length(prompt_tokens, max(group.values()) * [longest])
    return Shape(
        rows=config.mini_batches * (len(group) if shared else len(places)),
        length=whole if shared else prompt_tokens + longest,
        completions=config.mini_batches * len(places),
        questions=config.mini_batches * len(group),
    )


def _full(questions: int, config: SamplingConfig) -> Batch:
    """Return the completions of so many questions, all of full length. Their tables are views of
    one number, so that they take no memory."""
    group = config.num_generations
    count = questions * group
    size = (count, config.max_completion_length)
    zeros = torch.zeros(()).expand(size)
    prompts = tuple(Prompt(str(place // group)) for place in range(count))
    return Batch(
        prompts=prompts,
        teacher_prompts=prompts,
        completion_ids=torch.zeros((), dtype=torch.long).expand(size),
        completion_mask=torch.ones((), dtype=torch.bool).expand(size),
        advantages=zeros[:, 0],
        policy_weights=zeros,
        distill_weights=zeros,
        sampler_logprobs=zeros,
        hinted=zeros[:, 0].bool(),
        teacher=zeros[:, 0].long(),
        mini=zeros[:, 0].long(),
    )
