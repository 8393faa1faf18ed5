"""Drawing of completions: the sampling law, and a stream of random numbers for each completion."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kepo.errors import KepoConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The number of completions, their length, and the law they are drawn from; by vLLM's names."""

    n: int = 1
    """The number of completions of each prompt."""
    max_tokens: int
    temperature: float
    """The sampling temperature; 0.0 is greedy."""
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1:
            raise KepoConfigError(
                f"SamplingParams: max_tokens={self.max_tokens} and n={self.n}; expected both >= 1"
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise KepoConfigError(
                f"SamplingParams: temperature={self.temperature} and top_p={self.top_p}; expected "
                "temperature >= 0 (0 is greedy) and 0 < top_p <= 1"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seeds_for(self, prompts: int, given: Sequence[int] | None) -> Sequence[int] | None:
        """Return one seed per completion: the given ones, or new ones from torch's global
        generator; None where greedy, which reads none. Raises KepoConfigError if there are more or
        fewer of them."""
        if self.greedy:
            return None
        count = prompts * self.n
        if given is None:
            return torch.randint(2**62, (count,)).tolist()
        if len(given) != count:
            raise KepoConfigError(
                f"seeds: {len(given)} for {prompts} prompts and n={self.n}; expected {count}, one "
                "per completion"
            )
        return given


class Sampled(NamedTuple):
    """n completions of at most T tokens."""

    ids: Tensor  # (n, T) int64, pad id after the end
    mask: Tensor  # (n, T) bool, True on sampled tokens, the end token among them
    logprobs: Tensor  # (n, T) fp32 of each under the law it was drawn from; 0 if greedy or masked


class Written(NamedTuple):
    """A text that a model wrote, and the number of tokens it took, the end token among them."""

    text: str
    tokens: int


class SamplingLaw:
    """Temperature and nucleus: it draws tokens, and says their log-probabilities.

    Each completion has its own seed, so what it draws does not depend on its neighbours in the
    batch, nor on how a step's completions are shared out over batches and processes.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int], length: int):
        """Set the temperature, the nucleus and one seed for each completion of at most ``length``
        tokens."""
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._uniforms = torch.stack([_stream(seed, length) for seed in seeds])

    def __call__(self, logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Draw a token for each completion in ``rows (n,)`` from logits ``(n, V)``.

        place: the number of the token in its completion. Returns the tokens ``(n,)`` and their
        log-probabilities ``(n,)``, fp32.
        """
        logits = logits.float()
        for warper in self._warpers:
            logits = warper(None, logits)
        law = logits.log_softmax(-1)
        self._uniforms = self._uniforms.to(law.device)
        token = draw(law, self._uniforms[rows, place])
        return token[:, 0], law.gather(1, token)[:, 0]


def greedy(logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens ``(n,)``, and 0 for each, as nothing is drawn."""
    return logits.float().argmax(-1), torch.zeros(len(logits), device=logits.device)


def draw(law: Tensor, uniforms: Tensor) -> Tensor:
    """Return (n, 1) tokens: the first whose cumulative probability passes a number in [0, 1).

    law ``(n, V)`` log-probabilities, uniforms ``(n,)`` fp64. A token of probability 0 is never
    drawn. The sums are fp64: in fp32 the rare tokens of a large vocabulary would round away.
    """
    cumulative = law.double().exp_().cumsum(-1)
    reached = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, reached, right=True).clamp_(max=law.shape[1] - 1)
    # A parallel sum may rise by a rounding where nothing was added.
    impossible = law.gather(1, token) == -torch.inf
    return torch.where(impossible, law.argmax(-1, keepdim=True), token)


def _stream(seed: int, length: int) -> Tensor:
    """Return (length,) fp64 numbers in [0, 1) of Python's generator: torch's on the CPU reads 32
    bits of a seed."""
    numbers = random.Random(seed)
    return torch.tensor([numbers.random() for _ in range(length)], dtype=torch.float64)
