"""Packed rows: a prompt followed by all its completions, so that a model computes the prompt once.

    row          p0 p1 p2 p3 | a0 a1 a2 | b0 b1 | padding
    position      0  1  2  3    4  5  6    4  5
    attends to   earlier p     p, earlier a   p, earlier b

A token attends to the prompt and to what came before it in its own completion, and every completion
continues the prompt's positions: each sees exactly what it would see in a row of its own. The
states are those of separate rows up to rounding, and so are the gradients. The last token of a
completion is left out, as its state predicts nothing.

For text, and for updates alone: PrefixGrouper (arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kepo.errors import KepoDataError
from kepo.models.encoding import Inputs
from kepo.models.families.registry import family_of
from kepo_kernels.compute.devices import moved

PROMPT, PADDING = -1, -2
"""Segments of a packed row beside its completions, which are counted from 0."""

TAKES_MASKS = ("sdpa", "eager")
"""The attention implementations of transformers that take a mask for every query and key."""

ALIGNED = 16
"""A multiple of the numbers from one row of a mask to the next that torch asks for on CUDA."""


@dataclass(frozen=True)
class Packed:
    """R prompts and B completions of theirs, in R rows of L tokens, padded on the right."""

    input_ids: Tensor  # (R, L) int64
    types: Tensor  # (R, L) int64, 1 on image tokens
    positions: Tensor  # (axes, R, L) int64
    segments: Tensor  # (R, L) int64: PROMPT, PADDING or the number of a completion
    states_at: Tensor  # (B, T) int64: which of the R * L states predicts a token; 0 where masked

    def to(self, device: torch.device) -> Packed:
        return Packed(**{name: moved(x, device) for name, x in vars(self).items()})

    def attends(self) -> Tensor:
        """Return (R, 1, L, L) bool, True where the token of the third index attends to that of the
        fourth. Padding attends to padding: the softmax over nothing would be NaN."""
        mine, other = self.segments[:, :, None], self.segments[:, None, :]
        seen = (mine == other) | ((other == PROMPT) & (mine >= 0))
        return seen.tril_()[:, None]

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, which are of a model's dtype: 0 where a token attends
        to another, else -inf.

        Of a boolean mask, or of one whose rows lie otherwise, torch's attention makes a copy in
        each layer, and keeps it for backward.
        """
        attends = self.attends()
        length = attends.shape[-1]
        width = -(-length // ALIGNED) * ALIGNED
        added = attends.new_full((*attends.shape[:-1], width), -torch.inf, dtype=dtype)
        return added[..., :length].masked_fill_(attends, 0)

    def predicting(self, states: Tensor) -> Tensor:
        """Return (B, T, H) of the packed states (R, L, H): the one at t predicts token t."""
        flat = states.flatten(0, 1).index_select(0, self.states_at.flatten())
        return flat.view(*self.states_at.shape, -1)


def pack(
    inputs: Inputs, positions: Tensor, ids: Tensor, mask: Tensor, prompt_of: Sequence[int]
) -> Packed:
    """Return the packed rows of R prompts and B completions; all tensors are on the CPU.

    positions ``(axes, R, P)``: those of the prompts (`prompt_positions`). ids, mask ``(B, T)``: the
    completions, without what stands where the mask is False. prompt_of: for each completion the
    number of its prompt among ``inputs``; every prompt has a completion.
    """
    if ids.shape != mask.shape:
        raise KepoDataError(
            f"mask: {tuple(mask.shape)} beside ids {tuple(ids.shape)}; "
            "expected equal shapes, a row for each completion"
        )
    if len(prompt_of) != len(ids) or set(prompt_of) != set(range(len(inputs))):
        raise KepoDataError(
            f"prompt_of: {list(prompt_of)} for {len(inputs)} prompts and {len(ids)} completions; "
            "expected one number of a prompt per completion, and each prompt at least once"
        )
    shown = inputs.attention_mask.bool()
    prompts = shown.sum(-1).tolist()
    lengths = mask.sum(-1).tolist()
    ends = list(prompts)  # of each row, as completions are added
    starts = []
    for row, length in zip(prompt_of, lengths, strict=True):
        starts.append(ends[row])
        ends[row] += max(0, length - 1)
    size = (len(inputs), max(ends))
    packed = Packed(
        input_ids=torch.zeros(size, dtype=torch.long),
        types=torch.zeros(size, dtype=torch.long),
        positions=torch.zeros(len(positions), *size, dtype=torch.long),
        segments=torch.full(size, PADDING),
        states_at=torch.zeros(ids.shape, dtype=torch.long),
    )
    for row, length in enumerate(prompts):
        packed.input_ids[row, :length] = inputs.input_ids[row, shown[row]]
        packed.types[row, :length] = inputs.mm_token_type_ids[row, shown[row]]
        packed.positions[:, row, :length] = positions[:, row, shown[row]]
        packed.segments[row, :length] = PROMPT
    follows = [int(packed.positions[:, row, : prompts[row]].max()) + 1 for row in range(size[0])]
    for number, (row, start, length) in enumerate(zip(prompt_of, starts, lengths, strict=True)):
        if length == 0:
            continue
        end = start + length - 1
        packed.input_ids[row, start:end] = ids[number, mask[number]][:-1]
        packed.positions[:, row, start:end] = follows[row] + torch.arange(length - 1)
        packed.segments[row, start:end] = number
        at = torch.arange(start - 1, end)
        at[0] = prompts[row] - 1  # the prompt's last state predicts every completion's first token
        packed.states_at[number, mask[number]] = row * size[1] + at
    return packed


def prompt_positions(model: Any, inputs: Inputs) -> Tensor:
    """Return (axes, R, P) int64 on the CPU: the positions that the model's family gives the tokens
    of prompts, on one axis or on three (time, height, width); 0 on padding."""
    return family_of(model.config).positions(model, inputs)


def on_their_axes(positions: Tensor) -> Tensor:
    """Return positions (axes, rows, tokens) as forwards take them: without an axis if it is one."""
    return positions if len(positions) > 1 else positions[0]


def why_not_packed(config: Any, attention: str | None = None) -> str | None:
    """Return why a model computes of packed rows something else than of separate ones, by its
    attention or its layers, as a clause; None if it does not.

    attention: the implementation that will compute it; None = the one in its config.
    """
    attention = attention or config.get_text_config()._attn_implementation
    if attention not in TAKES_MASKS:
        return f"attn_implementation={attention!r} takes no mask for every query and key"
    return family_of(config).unshareable(config)


def packed_length(prompt: int, completions: Sequence[int]) -> int:
    """Return the tokens of a packed row, from the lengths of its prompt and its completions."""
    return prompt + sum(max(0, length - 1) for length in completions)
