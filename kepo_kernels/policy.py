"""The policy term of one token.

Plain, differentiable PyTorch on vectors, the same for every back-end.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kepo_kernels.engine import TokenLoss, TokenStats
from kepo_kernels.validate import IMPORTANCE_LEVELS, POLICY_LOSSES, Validator
from kepo_kernels.weights import per_token


@dataclass(frozen=True)
class PolicySettings:
    epsilon_low: float
    epsilon_high: float
    kl_coef: float
    entropy_coef: float
    policy_loss: str
    importance_level: str

    def check(self, check: Validator) -> None:
        check.number("epsilon_low", self.epsilon_low, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        for name in ("epsilon_high", "kl_coef"):
            check.number(name, getattr(self, name), lambda x: x >= 0, "a finite number >= 0")
        check.number("entropy_coef", self.entropy_coef, lambda x: True, "a finite number")
        check.choice("policy_loss", self.policy_loss, POLICY_LOSSES)
        check.choice("importance_level", self.importance_level, IMPORTANCE_LEVELS)


def policy_token_loss(
    check: Validator,
    settings: PolicySettings,
    lead: torch.Size,
    active: Tensor,
    hidden: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
) -> TokenLoss:
    """-min(r A, clip(r) A) + kl_coef k3 - entropy_coef H, after checking every input.

    Finite on rows that are not `active`, whatever stands there.
    """
    settings.check(check)
    check.per_sequence_or_token(lead, advantages=advantages)
    check.lead(lead, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check.same_device(
        hidden, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs
    )
    check.require(
        settings.kl_coef == 0.0 or ref_logprobs is not None,
        f"kl_coef={settings.kl_coef} needs ref_logprobs; pass them or set kl_coef=0",
    )
    advantages = per_token(advantages, lead)
    check.finite(
        active, advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs
    )
    active = active.reshape(-1)
    advantages, old_logprobs, ref_logprobs = (
        None if x is None else x.detach().reshape(-1)
        for x in (advantages, old_logprobs, ref_logprobs)
    )
    # Above the clip, so that it changes no value: see below.
    ceiling = 1.0 + math.log1p(settings.epsilon_high)

    def token_loss(stats: TokenStats, rows: Tensor) -> Tensor:
        logprobs, live = stats.logprobs, active[rows]
        dtype = logprobs.dtype
        advantage = torch.where(live, advantages[rows].to(dtype), 0)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[rows].to(dtype)
        log_ratio = torch.where(live, logprobs - old, 0)
        # Beyond the upper clip a positive advantage sends nothing back. exp of a huge log-ratio
        # would send 0 * inf = NaN.
        log_ratio = torch.where(advantage < 0, log_ratio, log_ratio.clamp(max=ceiling))
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1.0 - settings.epsilon_low, 1.0 + settings.epsilon_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if settings.kl_coef != 0.0:
            difference = torch.where(live, ref_logprobs[rows].to(dtype) - logprobs, 0)
            loss = loss + settings.kl_coef * (torch.expm1(difference) - difference)
        if settings.entropy_coef != 0.0:
            loss = loss - settings.entropy_coef * stats.entropy
        return loss

    return token_loss
