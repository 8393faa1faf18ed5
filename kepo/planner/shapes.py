"""The sizes of what an update computes at once, when every completion is as long as it may be.

The micro-batches are those that the loop itself would lay out (kepo.objective.micros).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from kepo.config import Config
from kepo.models.encoding import Prompt
from kepo.models.packing import TAKES_MASKS
from kepo.objective.batch import Batch
from kepo.objective.micros import Micro, plan_micros
from kepo.planner.held import Machine, completions_per_process
from kepo.sections import ModelsConfig, SamplingConfig


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


def shares_prompts(config: ModelsConfig, shareable: bool) -> bool:
    """Return whether a prompt is computed once for all its completions, if the model's family can.
    transformers' own choice of attention, None, takes masks."""
    masks = config.attn_implementation in (None, *TAKES_MASKS)
    return config.share_prompts and masks and shareable


def share_of(config: Config, machine: Machine, prompt_tokens: int, shareable: bool = True) -> Share:
    """Return what one process computes in a step whose prompts all have this many tokens.

    shareable: whether the student's family can share a prompt's row.
    """
    shared = shares_prompts(config, shareable)
    batch = _full(config, machine, shared)
    questions = config.prompts_per_step // config.mini_batches
    mini = _full(replace(config, prompts_per_step=questions), machine, shared)
    plan = [
        micro
        for own in plan_micros(mini, [prompt_tokens] * len(mini), config, shared)
        for micro in own
    ]
    # Rows of one question come in any order, as their completions differ in length.
    shapes = [Shape.of(micro, questions) for micro in plan]
    group = config.num_generations if shared else 1
    asked = len(set(batch.prompts))
    whole = Shape(
        rows=asked if shared else len(batch),
        length=prompt_tokens + group * (config.max_completion_length - shared),
        completions=len(batch),
        questions=asked,
    )
    return Share(max(shapes, key=_tokens), whole, len(shapes))


def _tokens(shape: Shape) -> tuple[int, int]:
    return shape.rows * shape.length, shape.completions


def _full(config: SamplingConfig, machine: Machine, shared: bool) -> Batch:
    """Return completions of full length: whole groups where prompts are shared, as one process gets
    them. Their tables are views of one number, so that they take no memory."""
    count, group = completions_per_process(config, machine), config.num_generations
    if shared:
        count = -(-config.prompts_per_step // machine.gpus) * group
    size = (count, config.max_completion_length)
    zeros = torch.zeros(()).expand(size)
    return Batch(
        prompts=tuple(Prompt(str(place // group)) for place in range(count)),
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
