"""The policy term of one token: GRPO and its relatives.

Plain, differentiable PyTorch on vectors, the same for every back-end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kepo_kernels.compute.autograd import TokenLoss, TokenStats
from kepo_kernels.compute.devices import moved
from kepo_kernels.validate import (
    IMPORTANCE_LEVELS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    Validator,
    describe,
    on_cpu,
)
from kepo_kernels.weights import LARGEST_LOG_RATIO, per_token

# (logprobs, log_ratio, advantages) of n tokens -> n losses
PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PolicySettings:
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    kl_coef: float | None
    kl_estimator: str
    kl_bias_correction: bool
    entropy_coef: float | None
    policy_loss: str | PolicyLoss
    importance_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "PolicySettings":
        """Pick the policy's settings, by name, from the arguments of a loss."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def checked(self, check: Validator) -> "PolicySettings":
        """Check the settings; return them with all numbers as Python floats."""
        wanted = {
            "epsilon_low": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
            "epsilon_high": (lambda x: x >= 0, "a finite number >= 0"),
            "kl_coef": (lambda x: x >= 0, "a finite number >= 0"),
            "sapo_temperature_pos": (lambda x: x > 0, "a finite number > 0"),
            "sapo_temperature_neg": (lambda x: x > 0, "a finite number > 0"),
            "entropy_coef": (lambda x: True, "a finite number"),
        }
        numbers: dict[str, Any] = {  # of fields that hold floats, which `replace` cannot see
            name: check.number(name, getattr(self, name), *what)
            for name, what in wanted.items()
            if getattr(self, name) is not None or name not in ("kl_coef", "entropy_coef")
        }
        numbers.setdefault("kl_coef", 0.0)
        numbers.setdefault("entropy_coef", 0.0)
        if self.delta is not None:
            least = 1.0 + numbers["epsilon_high"]
            expected = f"None or a number > 1 + epsilon_high = {least}"
            numbers["delta"] = check.number("delta", self.delta, lambda x: x > least, expected)
            check.require(
                self.policy_loss == "clip",
                f"delta={self.delta} bounds the ratio of policy_loss='clip' and would have no "
                f"effect on {self.policy_loss!r}; leave it out",
            )
        check.choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        numbers["kl_bias_correction"] = check.flag("kl_bias_correction", self.kl_bias_correction)
        if not callable(self.policy_loss):
            check.choice("policy_loss", self.policy_loss, POLICY_LOSSES, "or a callable")
        check.choice("importance_level", self.importance_level, IMPORTANCE_LEVELS)
        return replace(self, **numbers)

    def of_tokens(self, check: Validator) -> PolicyLoss:
        """Return the named policy loss, or the caller's own with its result checked."""
        own = self.policy_loss
        if not callable(own):
            named = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "reinforce": _reinforce}
            function = named[own]
            return lambda *of_tokens: function(self, *of_tokens)

        def checked(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
            values = own(logprobs, log_ratio, advantages)
            check.require(
                isinstance(values, Tensor) and values.shape == logprobs.shape,
                f"policy_loss returned {describe(values)} for {len(logprobs)} tokens; expected one "
                f"loss per token, shape [{len(logprobs)}]",
            )
            return values

        return checked


def _ratio(log_ratio: Tensor) -> Tensor:
    """Compute exp(min(log_ratio, LARGEST_LOG_RATIO)): beyond the bound it is constant, with
    gradient 0.

    exp(89) overflows fp32, and 0 times inf would be a NaN gradient even where the loss is flat.
    """
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def _clip(to: PolicySettings, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = _ratio(log_ratio)
    clipped = ratio.clamp(1.0 - to.epsilon_low, 1.0 + to.epsilon_high)
    if to.delta is not None:
        ratio = ratio.clamp(max=to.delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _cispo(to: PolicySettings, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Bound the ratio by 1 + epsilon_high; TRL's bound is its epsilon_high itself."""
    ratio = _ratio(log_ratio.detach()).clamp(max=1.0 + to.epsilon_high)
    return -ratio * advantages * logprobs


def _sapo(to: PolicySettings, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    ratio = _ratio(log_ratio)
    t = torch.full_like(ratio, to.sapo_temperature_neg)  # filled there, not copied from the host
    t = t.masked_fill(advantages > 0, to.sapo_temperature_pos)
    return -4.0 / t * torch.sigmoid(t * (ratio - 1.0)) * advantages


def _reinforce(
    to: PolicySettings, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor
) -> Tensor:
    return -advantages * logprobs


def _k1(difference: Tensor) -> Tensor:
    """Compute -d; its gradient is 0 in expectation, unless kl_bias_correction multiplies it."""
    return -difference


def _k2(difference: Tensor) -> Tensor:
    """Compute d^2 / 2; its gradient is that of KL(policy|ref) in expectation."""
    return 0.5 * difference * difference


def _k3(difference: Tensor) -> Tensor:
    """Compute e^m - m - 1, m = min(d, 20); its gradient is that of KL(ref|policy) in expectation,
    and that of KL(policy|ref) with kl_bias_correction."""
    difference = difference.clamp(max=LARGEST_LOG_RATIO)  # whole: -d alone would push away from ref
    return torch.expm1(difference) - difference


ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3}


@dataclass(frozen=True, eq=False)
class PolicyPart:
    """The policy's arguments of a loss; none is checked."""

    targets: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampler_weights: Tensor | None
    settings: PolicySettings
    weights: Tensor | None
    entropy_weights: Tensor | None
    reduction: str
    prefix: str = ""
    """Prefix of `weights` and `reduction` in the caller's signature, as in policy_weights."""

    def refuse_the_rest(self, check: Validator) -> None:
        """Refuse tensors, penalty and bonus of a policy part without targets and advantages."""
        settings = self.settings.checked(check)
        check.reduction(f"{self.prefix}reduction", self.reduction)
        check.unused(
            "targets and advantages",
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampler_weights=self.sampler_weights,
            kl_coef=settings.kl_coef or None,  # 0: the term is not asked for
            entropy_coef=settings.entropy_coef or None,
            entropy_weights=self.entropy_weights,
            **{f"{self.prefix}weights": self.weights},
        )

    def refuse_unused(self, check: Validator) -> None:
        """Refuse what belongs to a penalty or a bonus that was not asked for."""
        if self.settings.kl_coef is None:
            corrects = self.settings.kl_bias_correction or None
            check.unused("kl_coef", ref_logprobs=self.ref_logprobs, kl_bias_correction=corrects)
        if self.settings.entropy_coef is None:
            check.unused("entropy_coef", entropy_weights=self.entropy_weights)


@dataclass(frozen=True)
class PolicyTerm:
    """The policy term of a loss, and what it needs from the chunk loop."""

    token_loss: TokenLoss
    """Loss of the rows of one chunk; finite on rows that are not active, whatever their values."""
    alive: Tensor
    """Bool mask of shape lead: active tokens whose term is non-zero for some logits."""
    whole_sequences: bool
    """True if a token's term depends on its whole sequence, which its chunk must then hold."""


def policy_term(check: Validator, given: PolicyPart, active: Tensor, hidden: Tensor) -> PolicyTerm:
    """Check inputs, build sampler_weight * policy loss + kl_coef * k(ref) per token.

    The entropy bonus, which has weights of its own, is not part of it. `active` (lead) may be on
    the CPU while all other tensors are on a GPU.
    """
    settings, lead = given.settings.checked(check), hidden.shape[:-1]
    advantages, sampler_weights = given.advantages, given.sampler_weights
    old_logprobs, ref_logprobs = given.old_logprobs, given.ref_logprobs
    check.per_sequence_or_token(lead, advantages=advantages)
    if sampler_weights is not None:
        check.per_sequence_or_token(lead, columns=True, sampler_weights=sampler_weights)
    check.lead(lead, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check.same_device(
        hidden,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_weights=sampler_weights,
    )
    check.require(
        settings.kl_coef == 0.0 or ref_logprobs is not None,
        f"kl_coef={settings.kl_coef} needs ref_logprobs; pass them or set kl_coef=0",
    )
    advantages = per_token(advantages, lead)
    if sampler_weights is not None:
        sampler_weights = per_token(sampler_weights, lead)
    check.finite(
        active,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_weights=sampler_weights,
    )
    if sampler_weights is not None and on_cpu(sampler_weights):
        bad = active & (sampler_weights < 0)
        check.none_bad("sampler_weights", sampler_weights, bad, "values >= 0")
    by_sequence = settings.importance_level == "sequence" and len(lead) == 2
    alive = _alive(settings, by_sequence, active, advantages, sampler_weights)
    of_tokens = settings.of_tokens(check)
    live_tokens = moved(active, hidden.device).reshape(-1)
    advantages = advantages.detach().reshape(-1)
    old_logprobs, ref_logprobs, sampler_weights = (
        None if x is None else x.detach().reshape(-1)
        for x in (old_logprobs, ref_logprobs, sampler_weights)
    )

    def token_loss(stats: TokenStats, rows: Tensor) -> Tensor:
        logprobs, live = stats.logprobs, live_tokens[rows]
        dtype = logprobs.dtype
        advantage = torch.where(live, advantages[rows].to(dtype), 0)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[rows].to(dtype)
        log_ratio = torch.where(live, logprobs - old, 0)
        if by_sequence:
            log_ratio = _sequence_mean(log_ratio, live, rows, lead)
        loss = of_tokens(logprobs, log_ratio, advantage)
        if sampler_weights is not None:
            loss = loss * torch.where(live, sampler_weights[rows].to(dtype), 0)
        if ref_logprobs is not None and settings.kl_coef:
            difference = torch.where(live, ref_logprobs[rows].to(dtype) - logprobs, 0)
            estimate = ESTIMATORS[settings.kl_estimator](difference)
            if settings.kl_bias_correction:
                estimate = estimate * _ratio(log_ratio)
            loss = loss + settings.kl_coef * estimate
        return loss

    return PolicyTerm(token_loss, alive, by_sequence)


def _alive(
    settings: PolicySettings,
    by_sequence: bool,
    active: Tensor,
    advantages: Tensor,
    sampler_weights: Tensor | None,
) -> Tensor:
    """Return the active tokens whose policy term may be non-zero. Every built-in policy loss is
    proportional to advantage and sampler weight: if one of them is 0, and no penalty is asked for,
    the token's term is 0. The token may still be part of a sequence-level ratio; at
    that level a sequence is kept or dropped as a whole. Advantages on a GPU are not read if rows
    are found on the CPU: the host would wait for them."""
    if active.device != advantages.device:
        return active
    if settings.kl_coef != 0.0 or callable(settings.policy_loss):
        return active
    alive = active & (advantages != 0)
    if sampler_weights is not None:
        alive = alive & (sampler_weights != 0)
    return active & alive.any(-1, keepdim=True) if by_sequence else alive


def _sequence_mean(x: Tensor, live: Tensor, rows: Tensor, lead: torch.Size) -> Tensor:
    """Compute, for each row, the mean of x over the live rows of its sequence (GSPO).

    It uses a padded (B, T) matrix, in which every element is written once, so that the order of
    summation on a GPU is deterministic.
    """
    at = rows // lead[1], rows % lead[1]
    padded = x.new_zeros(lead, dtype=torch.float64).index_put(at, torch.where(live, x, 0).double())
    count = torch.zeros_like(padded).index_put(at, live.double()).sum(-1)
    mean = padded.sum(-1) / count.clamp(min=1)
    return mean.unsqueeze(-1).expand(lead)[at].to(x.dtype)
