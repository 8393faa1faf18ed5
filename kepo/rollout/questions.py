"""The questions that a step asks, and the share of them that the dataset itself answers."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from kepo.data.load import Example
from kepo.sections import SamplingConfig


def draw(
    examples: Sequence[Example], config: SamplingConfig, step: int, extra_round: int = 0
) -> list[Example]:
    """Draw the questions of a step: a pass over all of them in shuffled order, then another in a
    new one.

    A function of (seed, step, extra_round) alone, so a resumed run meets the questions it would
    have met. Extra rounds, of dynamic sampling, go through the examples in orders of their own.
    """
    first = (step - 1) * config.prompts_per_step
    places = range(first, first + config.prompts_per_step)
    stream = ("order", extra_round) if extra_round else ("order",)
    orders: dict[int, list[int]] = {}
    drawn = []
    for place in places:
        epoch, index = divmod(place, len(examples))
        if epoch not in orders:
            order = list(range(len(examples)))
            random.Random(seed_of(config.seed, epoch, *stream)).shuffle(order)
            orders[epoch] = order
        drawn.append(examples[orders[epoch][index]])
    return drawn


def from_data(config: SamplingConfig, step: int) -> int:
    """Return how many questions of a step the dataset answers: ``data_fraction`` of all so far."""

    def by_then(steps: int) -> int:
        return math.floor(steps * config.prompts_per_step * config.data_fraction + 1e-9)

    return by_then(step) - by_then(step - 1)


def seed_of(*facts: object) -> int:
    """Return a 63-bit seed from any facts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1
