"""Fused LM-head losses for post-training.

They never hold an [N, V] matrix, and compute only rows that have a gradient.
"""

from kepo_kernels.compute.autograd import TokenStats as TokenStats
from kepo_kernels.errors import KepoInputError as KepoInputError
from kepo_kernels.heads import Head as Head
from kepo_kernels.heads import LoRA as LoRA
from kepo_kernels.heads import lm_head_weight as lm_head_weight
from kepo_kernels.linear import fused_linear_logprobs as fused_linear_logprobs
from kepo_kernels.linear import fused_linear_loss as fused_linear_loss
from kepo_kernels.losses import fused_gated_kd_loss as fused_gated_kd_loss
from kepo_kernels.losses import fused_grpo_loss as fused_grpo_loss
from kepo_kernels.losses import fused_kepo_loss as fused_kepo_loss
from kepo_kernels.weights import bnpo_weights as bnpo_weights
from kepo_kernels.weights import dapo_weights as dapo_weights
from kepo_kernels.weights import dr_grpo_weights as dr_grpo_weights
from kepo_kernels.weights import grpo_weights as grpo_weights
from kepo_kernels.weights import loss_weights as loss_weights
from kepo_kernels.weights import sampler_weights as sampler_weights
from kepo_kernels.weights import sod_weights as sod_weights

__version__ = "0.1.0"
