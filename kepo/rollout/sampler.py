"""What the loop needs of whatever samples its completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import Sampled, SamplingParams


class Sampler(Protocol):
    """Samples completions with the policy's weights; `VLM` is one, `VllmSampler` another."""

    encoder: Encoder

    @property
    def collective(self) -> bool:
        """Whether `sample` needs all processes to call it together: the weights are sharded."""

    def ready(self) -> AbstractContextManager[None]:
        """Within it, `sample` uses the weights the policy has on entering. All processes enter."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:
        """Completions on the CPU, those of a prompt in a row, one seed for each.

        seeds: greedily none is read; None draws them from torch's global generator. Only where
        `collective` is False do the same seeds promise the same tokens beside other prompts,
        rounding apart.
        """
