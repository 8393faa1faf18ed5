"""The steps of a completion, and how much each is distilled on (SOD, arXiv 2605.07725)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kepo_kernels import sod_weights
from kepo_kernels.compute.devices import moved

_TAG = re.compile(r"</?[^<>\s]*>")
_END = re.compile(r"</[^<>\s]*>|\n")


def step_numbers(tokenizer: Any, completion_ids: Tensor) -> Tensor:
    """(B, T) token ids -> (B, T) int64 number of the step that each token belongs to, from 0.

    A step ends with the token in which a line, or a closing tag (``</think>``), comes to its end:
    the tag may be one token or several, and share them with its neighbours, as in ``.</``,
    ``think``, ``><``. What holds only tags and spaces is no step, and belongs to the one after it:
    the models are sure of a line ``<think>``, and measured by its drift all others would be far
    apart.
    """
    ids = completion_ids.cpu()
    # Tokens are decoded one by one. What a tokenizer makes of part of a character is no ASCII, so
    # line breaks and tags are the same as in the text that is decoded as a whole.
    texts = {token: tokenizer.decode([token]) for token in ids.unique().tolist()}
    ends = torch.zeros(ids.shape, dtype=torch.int64)
    for row, tokens in zip(ends, ids.tolist(), strict=True):
        row[_last_tokens([texts[token] for token in tokens])] = 1
    return (ends.cumsum(-1) - ends).to(completion_ids.device)


def _last_tokens(texts: Sequence[str]) -> list[int]:
    """Return the places of the tokens, given by their texts, that end a step."""
    text, ends = "".join(texts), list(accumulate(map(len, texts)))  # of each token, in the text
    found, start = [], 0
    for end in _END.finditer(text):
        if _TAG.sub("", text[start : end.end()]).strip():
            found.append(bisect_left(ends, end.end()))
        start = end.end()
    return found


def drift_weights(
    tokenizer: Any,
    completion_ids: Tensor,
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    completion_mask: Tensor,
) -> Tensor:
    """(B, T) factors of the divergence by how far the two models have drifted apart in each step.

    See `kepo_kernels.sod_weights`; the log-probabilities are those of the sampled tokens.
    """
    device = logprobs.device
    steps = moved(step_numbers(tokenizer, completion_ids), device)
    return sod_weights(steps, logprobs, teacher_logprobs, moved(completion_mask, device))
