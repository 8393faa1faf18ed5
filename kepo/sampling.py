"""What generation returns, and the law that its tokens are drawn from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sampled(NamedTuple):
    """n completions of at most T tokens."""

    ids: Tensor  # (n, T) int64, pad id after the end
    mask: Tensor  # (n, T) bool, True on sampled tokens, the end token among them
    logprobs: Tensor  # (n, T) fp32 of each under the law it was drawn from; 0 if greedy or masked


class SamplingLaw:
    """Temperature and nucleus, as the last logits processor of `generate`; keeps the
    log-probability of every token that is drawn.

    Of one step it holds the whole law, (n, V), and of the others a number per completion:
    `generate(output_scores=True)` would hold T such laws.
    """

    def __init__(self, temperature: float, top_p: float):
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._law: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(n, L) tokens so far, (n, V) logits -> the logits to draw the next one from."""
        self._keep(input_ids)
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        self._law = scores.log_softmax(-1)
        return scores

    def logprobs(self, completion_ids: Tensor) -> Tensor:
        """(n, T) fp32, for the tokens that were drawn. Call it once, after generation."""
        self._keep(completion_ids)
        return torch.cat(self._drawn[: completion_ids.shape[1]], dim=1)

    def _keep(self, ids: Tensor) -> None:
        if self._law is not None:
            self._drawn.append(self._law.gather(1, ids[:, -1:]))
