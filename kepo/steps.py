"""The steps of a completion, and how much each is distilled on (SOD, arXiv 2605.07725)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kepo_kernels import sod_weights


def step_numbers(tokenizer: Any, completion_ids: Tensor) -> Tensor:
    """(B, T) token ids -> (B, T) int64 number of the step that each token belongs to, from 0.

    A step ends with a token that has a line break in it, or that closes a tag (``</think>``).
    """
    ids = completion_ids.cpu()
    kinds, places = ids.unique(return_inverse=True)
    texts = [tokenizer.decode([token]) for token in kinds.tolist()]
    closes = ["\n" in text or (text.startswith("</") and text.endswith(">")) for text in texts]
    ends = torch.tensor(closes, dtype=torch.int64)[places].reshape(ids.shape)
    return (ends.cumsum(-1) - ends).to(completion_ids.device)


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
    steps = step_numbers(tokenizer, completion_ids)
    return sod_weights(steps, logprobs, teacher_logprobs, completion_mask)
