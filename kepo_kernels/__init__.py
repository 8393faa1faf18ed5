"""Fused LM-head losses for post-training.

They never hold an [N, V] matrix, and compute only rows that have a gradient.
"""

from kepo_kernels.compute.autograd import TokenStats
from kepo_kernels.errors import KepoInputError
from kepo_kernels.fused_head import FusedHead
from kepo_kernels.heads import Head, LoRA, head_of, lm_head_weight
from kepo_kernels.linear import (
    fused_linear_divergence,
    fused_linear_logprobs,
    fused_linear_loss,
)
from kepo_kernels.losses import fused_gated_kd_loss, fused_grpo_loss, fused_kepo_loss
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.weights import (
    bnpo_weights,
    dapo_weights,
    dr_grpo_weights,
    grpo_weights,
    loss_weights,
    sampler_weights,
    sod_weights,
)

__all__ = [
    "FusedHead",
    "Head",
    "KepoInputError",
    "LoRA",
    "TokenStats",
    "TopK",
    "bnpo_weights",
    "dapo_weights",
    "dr_grpo_weights",
    "fused_gated_kd_loss",
    "fused_grpo_loss",
    "fused_kepo_loss",
    "fused_linear_divergence",
    "fused_linear_logprobs",
    "fused_linear_loss",
    "grpo_weights",
    "head_of",
    "lm_head_weight",
    "loss_weights",
    "sampler_weights",
    "sod_weights",
]

__version__ = "0.1.0"
