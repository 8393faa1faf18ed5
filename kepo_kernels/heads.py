"""An LM head beyond its weight: what stands between hidden states and logits in real models.

    y = logit_scale (x @ weight^T + scale (x @ a^T) @ b^T + bias)
    logits = softcap tanh(y / softcap)

Every public function takes a plain weight tensor (V, H) or a `Head` for `lm_head` and
`teacher_lm_head`; the bias is an argument of its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """A low-rank update of a head's weight: weight + scale * b @ a, never formed."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Head:
    """A weight and how its logits are read.

    Gradients go to `weight`, `lora.a` and `lora.b`, to each only if it requires one: with a frozen
    weight its gradient costs neither a buffer nor a product.
    """

    weight: Tensor  # (V, H)
    softcap: float | None = None  # logits are read as softcap tanh(y / softcap); None = as they are
    logit_scale: float = 1.0  # multiplies the logits before the softcap (Cohere; 1/x for Granite)
    lora: LoRA | None = None

    @classmethod
    def of(cls, lm_head: "Tensor | Head") -> "Head":
        return lm_head if isinstance(lm_head, Head) else cls(lm_head)
