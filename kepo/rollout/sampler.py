"""The interface that the loop needs of whatever samples its completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import Sampled, SamplingParams


class Sampler(Protocol):
    """An object that samples completions with the policy's weights: `VLM` or `VllmSampler`."""

    encoder: Encoder

    @property
    def collective(self) -> bool:
        """True if `sample` needs all ranks to call it at once, because the weights are sharded."""

    def ready(self) -> AbstractContextManager[None]:
        """Let `sample` use the weights the policy has on entering. All ranks enter."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:
        """Return completions on the CPU, those of a prompt in a row, one seed for each.

        seeds: not read when sampling is greedy; None draws them from torch's global generator. Only
        where `collective` is False do the same seeds promise the same tokens beside other prompts,
        rounding apart.
        """

    def close(self) -> None:
        """Give back what sampling alone has held. Called once, at the end of a run."""
