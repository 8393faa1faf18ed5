"""Supervised training on worked answers: makes the tiny teacher, warms up the tiny student."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from tqdm import tqdm

from kepo.data.load import Example
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.tasks.multiple_choice import MultipleChoice
from kepo_kernels import fused_linear_loss

WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
TASK = MultipleChoice()
HintStyle = Literal["sum", "one_digit"]
"""What worked hints are like (`worked_hint`)."""
_DIGITS = re.compile(r"(\d) \+ (\d) = ")
_Pictures = Mapping[object, Sequence[Example]]
"""The examples whose picture may stand above a hint, by what the hint leaves to the picture."""


def train_supervised(
    vlm: VLM,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    hint_fraction: float = 0.0,
    hint_examples: Sequence[Example] | None = None,
    hint_style: HintStyle = "sum",
    progress: bool = True,
    desc: str = "",
) -> list[float]:
    """Minimise the next-token cross-entropy of worked answers; return the loss of every step.

    The answer to the plain question is ``<think>3 + 5 = 8</think><answer>C</answer>``, from the
    example's rationale. A share ``hint_fraction`` of the samples is about hints instead, half of it
    asking for one (with and without the right letter; the answer is ``<hint>3 + 5</hint>``), half
    giving that hint along with the question, under the image of another example, which agrees with
    it only in what the hint leaves open. Loss: mean over the completion tokens of the batch.

    hint_examples: the examples whose hints are given; None = ``examples``. Hints can rescue a model
    that follows hints about what it was never shown. hint_style: what hints say (`worked_hint`).

    Trains all parameters with AdamW in place; the learning rate rises over the first twentieth of
    the steps to lr and falls to 0 as a cosine. progress: show a bar, with ``desc`` before it.
    The same seed on the same machine gives the same bits. The model is left in eval mode.

    Raises KepoConfigError for settings out of range, KepoDataError for no examples or one without a
    rationale that the style of hints can use.
    """
    _check(examples, steps=steps, batch_size=batch_size, lr=lr, hint_fraction=hint_fraction)
    if hint_style not in get_args(HintStyle):
        raise KepoConfigError(
            f"train_supervised: hint_style={hint_style!r}; expected one of "
            f"{', '.join(get_args(HintStyle))}"
        )
    pictures = _pictures(examples, hint_style)
    if hint_examples is not None:
        hint_examples = [e for e in hint_examples if _left_open(e, hint_style) in pictures]
    draw = random.Random(seed)
    order = _endless(examples, draw)
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    losses = []
    vlm.model.train()
    bar = tqdm(range(steps), desc=desc, disable=not progress, mininterval=0.5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        pairs = [
            _sample(next(order), pictures, draw, hint_fraction, hint_examples, hint_style)
            for _ in range(batch_size)
        ]
        loss = _loss(vlm, [prompt for prompt, _ in pairs], [text for _, text in pairs])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    vlm.model.eval()
    return losses


def worked_hint(example: Example, style: HintStyle = "sum") -> str:
    """Return the hint that a good teacher would write.

    sum: the rationale up to its last "=" ("3 + 5"), which determines the answer; all of it if there
        is no "=".
    one_digit: the larger digit in its place ("? + 5", and the left one if they are equal), so that
        the other has to be read from the picture.
    """
    if style == "one_digit":
        left, right = digits_of(example)
        return f"{left} + ?" if left >= right else f"? + {right}"
    before, sign, _ = example.rationale.rpartition("=")
    return before.strip() if sign else example.rationale


def digits_of(example: Example) -> tuple[str, str]:
    """Return the two digits of a question, as its rationale names them."""
    match = _DIGITS.match(example.rationale)
    if match is None:
        raise KepoDataError(
            f"example {example.id!r} has the rationale {example.rationale!r}; expected one like "
            "'3 + 5 = 8'"
        )
    return match[1], match[2]


def _left_open(example: Example, style: HintStyle) -> object:
    """Return what a hint leaves to the picture: place and value of a digit, or nothing."""
    if style == "sum":
        return None
    left, right = digits_of(example)
    return (1, right) if left >= right else (0, left)


def _pictures(examples: Sequence[Example], style: HintStyle) -> _Pictures:
    if style == "sum":
        return {None: examples}
    found: dict[object, list[Example]] = {}
    for example in examples:
        for placed in enumerate(digits_of(example)):
            found.setdefault(placed, []).append(example)
    return found


def _sample(
    example: Example,
    pictures: _Pictures,
    draw: random.Random,
    hint_fraction: float,
    hint_examples: Sequence[Example] | None = None,
    style: HintStyle = "sum",
) -> tuple[Prompt, str]:
    kind = draw.random()
    if kind >= hint_fraction:
        return prompt_of(TASK, example), TASK.worked_answer(example)
    if kind < hint_fraction / 2:
        request = hint_prompt(TASK, example, with_answer=draw.random() < 0.5)
        return request, f"<hint>{worked_hint(example, style)}</hint>"
    if hint_examples is not None:
        example = draw.choice(hint_examples)
    prompt = prompt_of(TASK, example, worked_hint(example, style))
    # If the picture showed what the hint says, the hint would never be read.
    images = draw.choice(pictures[_left_open(example, style)]).images
    return replace(prompt, images=images), TASK.worked_answer(example)


def _loss(vlm: VLM, prompts: list[Prompt], completions: list[str]) -> torch.Tensor:
    ids, mask = vlm.encode_completions(completions)
    hidden = vlm.completion_hidden(vlm.encode(prompts), ids, mask)
    return fused_linear_loss(
        hidden,
        vlm.head,
        ids,
        lambda stats, rows: -stats.logprobs,
        completion_mask=mask,
        reduction="token_mean",
    )


def _endless(examples: Sequence[Example], draw: random.Random):
    """Yield the examples without end, in a new order each epoch."""
    while True:
        yield from draw.sample(examples, len(examples))


def _schedule(step: int, steps: int) -> float:
    """Return the share of the full learning rate: a linear rise, then a cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _check(
    examples: Sequence[Example], *, steps: int, batch_size: int, lr: float, hint_fraction: float
) -> None:
    if steps < 1 or batch_size < 1:
        raise KepoConfigError(
            f"train_supervised: steps={steps}, batch_size={batch_size}; expected both >= 1"
        )
    if not (math.isfinite(lr) and lr > 0):
        raise KepoConfigError(f"train_supervised: lr={lr}; expected a positive number")
    if not 0 <= hint_fraction <= 1:
        raise KepoConfigError(
            f"train_supervised: hint_fraction={hint_fraction}; expected a share in [0, 1]"
        )
    if not examples:
        raise KepoDataError("train_supervised: examples is empty; expected at least one")
    for example in examples:
        if not example.rationale:
            raise KepoDataError(
                f"train_supervised: example {example.id!r} has no rationale; supervised training "
                "needs the worked solution in the 'rationale' field of its QA record"
            )
