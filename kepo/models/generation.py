"""Token by token generation in which a prompt is computed once and a row that ended is gone.

`transformers.generate` computes a prompt again for each of its completions, and computes rows that
ended until the last one has. Here a prompt is one row of the first forward; then its keys and
values are copied for each of its completions, and a completion that ends gives its place up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kepo.models.encoding import Inputs
from kepo.models.packing import on_their_axes, prompt_positions
from kepo.models.vision import cache_name, forward_inputs

BLOCK = 64
"""Tokens that a cache has new room for whenever its room is used up."""

Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Maps (rows, V) logits, the completions (rows,) they belong to and the number of the token to the
tokens (rows,) and their log-probabilities (rows,)."""


class Generation(NamedTuple):
    """How completions are made of prompts."""

    n: int
    """The number of completions of each prompt."""
    max_tokens: int
    end_ids: Sequence[int]
    any_goes_on: Callable[[bool], bool]
    """Told before every forward whether a completion goes on; returns whether there is a forward.
    The ranks of a sharded model need it as long as one of them goes on."""


@torch.no_grad()
def generate(model: Any, inputs: Inputs, draw: Draw, how: Generation) -> tuple[Tensor, Tensor]:
    """Return the tokens ``(B n, T)`` of n completions per prompt and their log-probabilities.

    T is the length of the longest; what stands after the end of a completion means nothing. The
    host waits for the device once per token, to learn which completions have ended.
    """
    count, device = len(inputs) * how.n, inputs.input_ids.device
    ids = torch.zeros(count, how.max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, how.max_tokens, device=device)
    ends = torch.tensor(list(how.end_ids), device=device)
    rows = torch.arange(count, device=device)  # the completion that each row of the batch is
    logits, state = _prefilled(model, inputs, how)
    goes_on, length = True, 0
    for place in range(how.max_tokens):
        tokens, ids_logprobs = draw(logits, rows, place)
        ids[rows, place], logprobs[rows, place] = tokens, ids_logprobs
        length += goes_on
        going = (~torch.isin(tokens, ends)).tolist()
        goes_on = goes_on and any(going)
        if place + 1 == how.max_tokens or not how.any_goes_on(goes_on):
            break
        if not all(going):
            # Other ranks may need forwards of this one: then its first row runs on, unread.
            order = _filled_up(going) if goes_on else [0]
            state.keep(order)
            kept = torch.tensor(order, device=device)
            rows, tokens = rows[kept], tokens[kept]
        logits = state.next_logits(model, tokens)
    return ids[:, :length], logprobs[:, :length]


class _State:
    """What the rows of a batch go on from: their cache, the next position, and the padding."""

    def __init__(self, cache: Any, axes: int, positions: Tensor, mask: Tensor | None):
        self.cache = cache
        self.axes = axes
        self.positions = positions  # (rows,) of the next token, the same on all axes
        self.mask = mask  # (rows, tokens in the cache), or None if nothing is padding

    def keep(self, order: Sequence[int]) -> None:
        """Make row i the row that is now at ``order[i]``."""
        moved = [place for place, row in enumerate(order) if place != row]
        device = self.positions.device
        kept = torch.tensor(order, device=device)
        to = torch.tensor(moved, dtype=torch.long, device=device)
        for layer in self.cache.layers:
            if isinstance(layer, _RoomyLayer):
                layer.keep(len(order), to, kept[to])
            else:
                layer.reorder_cache(kept)
        self.positions = self.positions[kept]
        self.mask = None if self.mask is None else self.mask[kept]

    def next_logits(self, model: Any, tokens: Tensor) -> Tensor:
        """Append a token ``(rows,)`` to each row and return ``(rows, V)`` logits of the next."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=on_their_axes(self.positions.expand(self.axes, -1)[..., None]),
            use_cache=True,
            **{cache_name(model): self.cache},
        )
        self.positions = self.positions + 1
        return out.logits[:, -1]


def _prefilled(model: Any, inputs: Inputs, how: Generation) -> tuple[Tensor, _State]:
    """Return the logits of all first tokens, and what the completions go on from."""
    positions = prompt_positions(model, inputs)
    device, mask = inputs.input_ids.device, inputs.attention_mask
    given = forward_inputs(model, inputs)
    given["position_ids"] = on_their_axes(positions).to(device)
    out = model(**given, use_cache=True, logits_to_keep=1)
    cache = out[cache_name(model)]
    repeated = torch.arange(len(inputs), device=device).repeat_interleave(how.n)
    for place, layer in enumerate(cache.layers):
        layer.reorder_cache(repeated)  # the one way to choose rows that all kinds of layers have
        if type(layer) is DynamicLayer:  # a sliding window keeps few tokens, and its own counsel
            cache.layers[place] = _RoomyLayer(layer.keys, layer.values)
    state = _State(
        cache,
        len(positions),
        (positions.amax((0, 2)) + 1).to(device).repeat_interleave(how.n),
        None if bool(mask.all()) else mask.repeat_interleave(how.n, dim=0),
    )
    return out.logits[:, -1].repeat_interleave(how.n, dim=0), state


def _filled_up(going: Sequence[bool]) -> list[int]:
    """Return, for each place, the row that is to be there so that unfinished rows come first: the
    last of them take the places of finished ones, and the others stay."""
    left = [row for row, goes_on in enumerate(going) if goes_on]
    movers = iter(reversed(left))
    return [place if going[place] else next(movers) for place in range(len(left))]


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for tokens to come, so that appending one copies nothing
    else. ``keys`` and ``values`` show what is in use."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._whole = (keys, values)  # no room yet

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, _, start, _ = self.keys.shape
        end = start + key_states.shape[-2]
        if end > self._whole[0].shape[-2]:
            self._whole = (_with_room(self.keys, end), _with_room(self.values, end))
        keys, values = (whole[:rows, :, :end] for whole in self._whole)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def keep(self, rows: int, to: Tensor, source: Tensor) -> None:
        """Copy the rows ``source`` over the rows ``to``, then leave the first ``rows``."""
        for shown in (self.keys, self.values):
            shown.index_copy_(0, to, shown[source])
        self.keys, self.values = self.keys[:rows], self.values[:rows]


def _with_room(shown: Tensor, end: int) -> Tensor:
    rows, heads, used, size = shown.shape
    whole = shown.new_empty(rows, heads, end + BLOCK, size)
    whole[:, :, :used] = shown
    return whole
