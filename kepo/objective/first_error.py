"""The tokens of a completion that are distilled on, by where the teacher finds the first error."""

from __future__ import annotations

import math

from torch import Tensor

from kepo.sections import ObjectiveConfig


def distilled_tokens(
    teacher_logprobs: Tensor, completion_mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Return (B, T) bool, True on the tokens that ``distill_tokens`` says.

    first_error: every token up to and with the first one to which the teacher gives a probability
    under ``error_threshold``; all of a completion that has none. after_error: all other tokens.
    (Supervision after an early error, of which KEPO says that it misleads, left out or alone.)

    Args:
        teacher_logprobs: (B, T), of the completions' own tokens.
        completion_mask: (B, T) bool; tokens outside of it are never errors, and never distilled on.
    """
    unlikely = completion_mask & (teacher_logprobs < math.log(config.error_threshold))
    after = unlikely.cumsum(-1) - unlikely.long() > 0
    return completion_mask & (after if config.distill_tokens == "after_error" else ~after)
