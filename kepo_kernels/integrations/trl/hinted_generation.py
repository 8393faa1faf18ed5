"""A second generation, with hints, for prompts whose completions have all failed.

TRL's own `_generate` samples both times. A completion that was sampled with a hint takes the place
of one without, behind the prompt without: the policy learns to do without the hint.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kepo_kernels.errors import KepoInputError

Prompts = list[Any]
HintedPrompts = Callable[[Prompts, list[Any], list[dict[str, Any]]], Prompts]
"""A function of prompts, their failed completions and their rows of the data set that returns a
prompt with a hint for each, or None to leave the completion as it is."""

COMPLETION_IDS, COMPLETIONS, LOGPROBS = 1, 3, 4
"""Places in what TRL's `_generate` returns."""


def failed_groups(gates: Tensor, generations: int) -> Tensor:
    """Return which completions (N,) belong to a prompt of which no completion is open."""
    groups = gates.view(-1, generations)
    return (groups.sum(1) == 0).repeat_interleave(generations)


def generate_again(
    hinted_prompts: HintedPrompts,
    generate: Callable[[Prompts], tuple],
    prompts: Prompts,
    examples: list[dict[str, Any]],
    first: tuple,
    failed: list[bool],
) -> tuple[tuple, int]:
    """Return the first generation with failed completions replaced, and how many were.

    Every process generates as many as before, as TRL gathers their lengths.
    """
    rows = [row for row, closed in enumerate(failed) if closed]
    asked = [prompts[row] for row in rows]
    found = hinted_prompts(
        asked, [first[COMPLETIONS][row] for row in rows], [examples[row] for row in rows]
    )
    if not isinstance(found, list | tuple) or len(found) != len(rows):
        came = type(found).__name__ + (f" of {len(found)}" if hasattr(found, "__len__") else "")
        raise KepoInputError(
            f"hinted_prompts: it returned a {came}; expected a list of {len(rows)}, "
            "a prompt or None for each prompt that it was given"
        )
    hinted = {row: prompt for row, prompt in zip(rows, found, strict=True) if prompt is not None}
    second = generate([hinted.get(row, prompt) for row, prompt in enumerate(prompts)])
    merged = list(first)
    for place in (COMPLETION_IDS, COMPLETIONS, LOGPROBS):
        if first[place] is not None:
            merged[place] = [
                (second if row in hinted else first)[place][row] for row in range(len(prompts))
            ]
    return tuple(merged), len(hinted)
