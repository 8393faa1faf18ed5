"""Policy losses that verl lacks: whole sequences' ratios in each of our objectives.

verl's vanilla, gspo, sapo, cispo and gpg are our clip with delta = clip_ratio_c, our clip at
sequence level, and sapo, cispo and reinforce at token level, and are not registered again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from kepo_kernels.compute.autograd import TokenStats
from kepo_kernels.objectives.policy import PolicyPart, PolicySettings, policy_term
from kepo_kernels.validate import Validator

NAMES = {
    "kepo_sequence_clip": "clip",  # GSPO, and clip_ratio_c bounds it for advantages below 0, too
    "kepo_sequence_cispo": "cispo",
    "kepo_sequence_sapo": "sapo",
}


def register() -> None:
    """Give the losses their names."""
    for name, objective in NAMES.items():
        register_policy_loss(name)(partial(sequence_loss, objective))


def sequence_loss(
    objective: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute a policy loss of (B, T) tokens, whose ratio is the mean of their sequence."""
    mask = response_mask.bool()
    part = PolicyPart(
        targets=log_prob,  # no logits are read
        advantages=advantages,
        old_logprobs=old_log_prob,
        ref_logprobs=None,
        sampler_weights=rollout_is_weights,
        settings=_settings(objective, config),
        weights=None,
        entropy_weights=None,
        reduction="sum",
    )
    term = policy_term(Validator("sequence_loss"), part, mask, log_prob.unsqueeze(-1))
    flat = log_prob.reshape(-1)
    nothing = torch.zeros_like(flat)
    rows = torch.arange(len(flat), device=flat.device)
    losses = term.token_loss(TokenStats(flat, nothing, nothing), rows).reshape(log_prob.shape)
    batch = config.global_batch_info
    loss = agg_loss(losses, response_mask, loss_agg_mode, **batch)
    drift = torch.where(mask, old_log_prob - log_prob.detach(), 0.0).sum() / mask.sum().clamp(min=1)
    return loss, {"actor/ppo_kl": drift.item()}


def _settings(objective: str, config: Any) -> PolicySettings:
    """Return the settings of verl's actor under our names."""

    def bound(side: str) -> float:
        own = getattr(config, f"clip_ratio_{side}")
        return config.clip_ratio if own is None else own

    return PolicySettings(
        epsilon_low=bound("low"),
        epsilon_high=bound("high"),
        delta=config.clip_ratio_c if objective == "clip" else None,
        kl_coef=0.0,
        kl_estimator="k3",
        kl_bias_correction=False,
        entropy_coef=0.0,
        policy_loss=objective,
        importance_level="sequence",
        sapo_temperature_pos=config.tau_pos,
        sapo_temperature_neg=config.tau_neg,
    )
