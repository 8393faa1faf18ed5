"""Supervised training on worked answers: makes the tiny teacher, warms up the tiny student."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

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
    progress: bool = True,
    desc: str = "",
) -> list[float]:
    """Minimise the next-token cross-entropy of worked answers; return the loss of every step.

    The answer to the plain question is ``<think>3 + 5 = 8</think><answer>C</answer>``, from the
    example's rationale. A share ``hint_fraction`` of the samples is about hints instead, half of it
    asking for one (with and without the right letter; the answer is ``<hint>3 + 5</hint>``), half
    giving that hint along with the question, under the image of another example. Loss: mean over
    the completion tokens of the batch.

    hint_examples: the examples whose hints are given; None = ``examples``. Hints can rescue a model
    that follows hints about what it was never shown.

    Trains all parameters with AdamW in place; the learning rate rises over the first twentieth of
    the steps to lr and falls to 0 as a cosine. progress: show a bar, with ``desc`` before it.
    The same seed on the same machine gives the same bits. The model is left in eval mode.

    Raises KepoConfigError for settings out of range, KepoDataError for no examples or one without a
    rationale.
    """
    _check(examples, steps=steps, batch_size=batch_size, lr=lr, hint_fraction=hint_fraction)
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
            _sample(next(order), examples, draw, hint_fraction, hint_examples)
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


def worked_hint(example: Example) -> str:
    """Return the rationale up to its last "=" ("3 + 5"); all of it if there is none."""
    before, sign, _ = example.rationale.rpartition("=")
    return before.strip() if sign else example.rationale


def _sample(
    example: Example,
    examples: Sequence[Example],
    draw: random.Random,
    hint_fraction: float,
    hint_examples: Sequence[Example] | None = None,
) -> tuple[Prompt, str]:
    kind = draw.random()
    if kind >= hint_fraction:
        return prompt_of(TASK, example), TASK.worked_answer(example)
    if kind < hint_fraction / 2:
        request = hint_prompt(TASK, example, with_answer=draw.random() < 0.5)
        return request, f"<hint>{worked_hint(example)}</hint>"
    if hint_examples is not None:
        example = draw.choice(hint_examples)
    prompt = prompt_of(TASK, example, worked_hint(example))
    images = draw.choice(examples).images  # if the picture helped, the hint would never be read
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
