"""What the loop needs of whatever samples its completions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import Sampled


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
        *,
        num_return_sequences: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> Sampled:
        """Completions on the CPU, those of a prompt in a row, one seed for each.

        temperature: 0.0 is greedy, and reads no seed. Only where `collective` is False do the same
        seeds promise the same tokens beside other prompts, rounding apart.
        """
