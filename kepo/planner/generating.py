"""The memory of token by token generation (kepo.models.generation), moment by moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kepo.planner.activations import image_bytes, inference, pixel_bytes, placed_bytes
from kepo.planner.model_sizes import ModelSizes
from kepo.planner.standing import Held

MASK_BYTES = 8
"""Bytes of a token in the mask that says what is padding."""
PAGE_BYTES = 4096
"""Bytes of a page of host memory."""


class Generating(NamedTuple):
    """What is generated: completions of equally long prompts, all of full length."""

    questions: int
    completions: int
    """Completions of each question."""
    prompt_tokens: int
    images: int
    """Images of all questions together, of ``patches`` each."""
    patches: int
    image_tokens: int
    """Tokens of all images of a question."""
    new_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float


def generating(model: ModelSizes, what: Generating) -> Iterator[tuple[str, Held]]:
    """Yield the moments and what is held then, the model's weights left out."""
    sequences, length = what.questions * what.completions, what.prompt_tokens
    a_token = model.cache_bytes_per_token
    a_layer = a_token // len(model.layers)
    prompts, logits = what.questions * length, sequences * model.vocab * model.dtype.itemsize

    first = inference(model, what.questions, length, what.images, what.patches, packed=False)
    first += placed_bytes(model, what.questions, what.image_tokens)
    yield "prompts", Held(cache=prompts * a_token, activations=first)
    # Layer by layer: the last one's old keys and values stand beside the new ones.
    repeated = sequences * length * a_token + prompts * a_layer
    features = image_bytes(model, what.images, what.patches)
    yield "prompts repeated", Held(cache=repeated, activations=features, sampling=logits)

    pixels, cache = (
        pixel_bytes(model, what.images, what.patches),
        sequences * length * a_token,
    )
    if what.new_tokens > 1:
        old, room = rooms(length, what.new_tokens - 1)
        grown = _resident(model, old + 1, room) * a_token + old * a_layer
        yield "room for tokens", Held(cache=sequences * grown, activations=pixels, sampling=logits)
        longest = length + what.new_tokens - 1
        cache = sequences * _resident(model, longest, room) * a_token
        work = model.decoding_layer(sequences, longest) + 2 * MASK_BYTES * sequences * longest
        at_work = Held(cache=cache, activations=pixels + work, sampling=logits)
        yield "last token", at_work
    draws = max(2 * logits, logits + model.drawing(sequences, what.temperature, what.top_p))
    yield "last draw", Held(cache=cache, activations=pixels, sampling=draws)


def _resident(model: ModelSizes, written: int, room: int) -> int:
    """Return for how many tokens a cache takes memory, for each row and head. On a CPU a page that
    was never written takes none."""
    if model.device != "cpu":
        return room
    return min(room, written + PAGE_BYTES // (model.head_dim * model.dtype.itemsize))


def rooms(prompt_tokens: int, appended: int) -> tuple[int, int]:
    """Return for how many tokens a cache had room before its last growth, and has after it; it
    grows when a token finds no room, to that token and a block more."""
    from kepo.models.generation import BLOCK  # imports transformers

    old = prompt_tokens + (appended - 1) // (BLOCK + 1) * (BLOCK + 1)
    return old, old + BLOCK + 1
