"""The terminal output of a run: one bar of its steps, and lines beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tqdm import tqdm

from kepo.distributed.processes import is_rank0


def say(text: str) -> None:
    """Print a line on rank 0, beside the bar."""
    if is_rank0():
        tqdm.write(text)


def step_bar(done: int, steps: int) -> tqdm:
    """Return the numbers of the steps that are still to be done, under a bar on rank 0."""
    left = range(done + 1, steps + 1)
    return tqdm(left, initial=done, total=steps, desc="kepo", disable=not is_rank0())


def show(bar: tqdm, values: Mapping[str, float]) -> None:
    """Put the step's reward, gate rate and rescue rate beside the bar."""
    bar.set_postfix(
        reward=f"{values.get('reward', math.nan):.2f}",
        gate=f"{values['kepo/gate_rate']:.2f}",
        rescue=f"{values['kepo/rescue_rate']:.2f}",
        refresh=False,
    )
