"""One micro-step: a student forward, a teacher forward on open sequences only, one fused loss."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kepo.distributed.processes import all_gather, any_rank
from kepo.models.vlm import VLM
from kepo.objective.batch import Batch
from kepo.objective.credit import correction_weights, hinted_weights
from kepo.objective.sod import drift_weights
from kepo.sections import ObjectiveConfig
from kepo_kernels import TokenStats, fused_kepo_loss, fused_linear_logprobs
from kepo_kernels.objectives.policy import ESTIMATORS


@dataclass
class StepTotals:
    """Sums over the micro-batches and iterations of a step, from which its metrics are made."""

    policy_loss: float = 0.0
    distill_loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    divergence: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    tokens: int = 0
    teacher_tokens: int = 0
    teacher_seconds: float = 0.0
    sampler_gap: float = 0.0
    sampler_gap_max: float = 0.0
    sampled_tokens: int = 0
    ratio: float = 0.0
    ratio_max: float = 0.0
    ratio_tokens: int = 0

    def of_all(self) -> StepTotals:
        """Return the totals of all ranks as one: sums, and the larger of a maximum or a time."""
        everyones = [vars(totals) for totals in all_gather(self)]
        of = {name: max if name in _LARGEST else sum for name in vars(self)}
        return StepTotals(**{name: of[name](t[name] for t in everyones) for name in of})


_LARGEST = ("sampler_gap_max", "ratio_max", "teacher_seconds")


def kepo_step(
    policy: VLM,
    teacher: VLM | None,
    ref: VLM | None,
    micro: Batch,
    config: ObjectiveConfig,
    totals: StepTotals,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a micro-batch, ready for backward, and its (B, T) detached
    log-probabilities.

    One student forward feeds the policy term and the divergence. The teacher's backbone and head
    run only on the sequences whose gate is open; with every gate closed it does not run, unless it
    is sharded and another rank has open ones. Call it through `VLM.run_wrapped` if the policy is
    spread over ranks. Adds the numbers of the micro-batch to ``totals``.

    Where a model's states are not finite the loss is NaN, on every device: the caller sees it in
    the gradients, and skips the step.
    """
    micro = micro.to(policy.device)
    ids, mask = micro.completion_ids, micro.completion_mask
    odd: list[str] = []  # models whose states are not finite
    hidden = policy.completion_hidden(policy.encode(micro.prompts), ids, mask)
    hidden = _without_nan(hidden, mask, odd, "student")
    ref_logprobs = None if ref is None else _ref_logprobs(ref, micro, config, odd)
    sampler_weights = _sampler_weights(policy, hidden.detach(), micro, config, totals)
    distillation = _distillation(policy, teacher, hidden.detach(), micro, config, totals, odd)
    loss, stats = fused_kepo_loss(
        hidden,
        policy.lm_head,
        ids,
        micro.advantages,
        completion_mask=mask,
        policy_weights=micro.policy_weights,
        distill_coef=config.distill_coef,
        beta=config.beta,
        old_logprobs=micro.old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_weights=sampler_weights,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        policy_loss=config.policy_loss,
        importance_level=config.importance_level,
        return_stats=True,
        **distillation,
        **_softmax(config),
    )
    distill_loss = 0.0
    if distillation:
        distill_loss = float((distillation["distill_weights"] * stats.divergence).sum())
    if odd:
        if not math.isnan(totals.policy_loss):  # said once in a step
            print(
                f"states of the {' and the '.join(odd)} are not finite: look at its weights and at "
                "preprocessor_config.json"
            )
        loss = loss * math.nan
    totals.distill_loss += distill_loss
    totals.policy_loss += float(loss.detach()) - config.distill_coef * distill_loss
    _add(totals, stats, micro, config, ref_logprobs)
    return loss, stats.logprobs


def _softmax(config: ObjectiveConfig) -> dict[str, Any]:
    """Return the settings by which every call of the kernels reads logits, and the
    implementation."""
    return dict(
        temperature=config.temperature, impl=config.impl, workspace_bytes=config.workspace_bytes
    )


@torch.no_grad()
def _logprobs(
    model: VLM, states: Tensor, ids: Tensor, mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Score the ids: (B, T) log-probabilities where the mask is, 0 elsewhere."""
    head = model.lm_head
    return fused_linear_logprobs(states, head, ids, completion_mask=mask, **_softmax(config))


def _ref_logprobs(ref: VLM, micro: Batch, config: ObjectiveConfig, odd: list[str]) -> Tensor:
    ids, mask = micro.completion_ids, micro.completion_mask
    shown = ref.encode(micro.prompts)
    with torch.no_grad():
        hidden = ref.run_wrapped(lambda: ref.completion_hidden(shown, ids, mask))
    hidden = _without_nan(hidden, mask, odd, "reference")
    return _logprobs(ref, hidden, ids, mask, config)


def _sampler_weights(
    policy: VLM, hidden: Tensor, micro: Batch, config: ObjectiveConfig, totals: StepTotals
) -> Tensor | None:
    """Return (B, T) factors of the policy loss where another law sampled; None if none did.

    Adds the sampler's ratios to ``totals``.
    """
    own, hinted = _to_correct(micro, config)
    corrected = own | hinted
    if not bool(corrected.any()):
        return None
    before = micro.old_logprobs
    if before is None:
        before = _logprobs(policy, hidden, micro.completion_ids, corrected, config)
    weights = correction_weights(before, micro.sampler_logprobs, own, config.sampler_cap)
    if config.hinted_correction != "none":
        weights = weights * hinted_weights(
            before,
            micro.sampler_logprobs,
            hinted,
            config.hinted_correction,
            config.hinted_cap,
            config.hinted_gamma,
        )
    if bool(own.any()):
        totals.ratio += float(weights[own].sum())
        totals.ratio_max = max(totals.ratio_max, float(weights[own].max()))
        totals.ratio_tokens += int(own.sum())
    return weights


def _distillation(
    policy: VLM,
    teacher: VLM | None,
    hidden: Tensor,
    micro: Batch,
    config: ObjectiveConfig,
    totals: StepTotals,
    odd: list[str],
) -> dict[str, Any]:
    """Ask the teacher, and return its arguments for the loss; none if every gate is closed.

    The teacher's states are only those of the open sequences. Adds its time and tokens to
    ``totals``.
    """
    ids, mask = micro.completion_ids, micro.completion_mask
    opened = micro.opened.nonzero().squeeze(-1)
    distils = teacher is not None and len(opened) > 0
    if config.distils and teacher.collective and any_rank(distils) and not distils:
        # For those who need this process's share of it.
        _open_hidden(teacher, micro, torch.arange(1, device=ids.device), [])
    if not distils:
        return {}
    started = _now(hidden)
    states = _open_hidden(teacher, micro, opened, odd)
    totals.teacher_seconds += _now(hidden) - started
    totals.teacher_tokens += int(mask[opened].sum())
    weights = micro.distill_weights
    if config.step_weights:
        ids, mask = ids[opened], mask[opened]
        factors = drift_weights(
            policy.tokenizer,
            ids,
            _logprobs(policy, hidden[opened], ids, mask, config),
            _logprobs(teacher, states, ids, mask, config),
            mask,
        )
        weights = weights.index_copy(0, opened, weights[opened] * factors)
    return dict(teacher_hidden=states, teacher_lm_head=teacher.lm_head, distill_weights=weights)


def _to_correct(micro: Batch, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return (B, T) bool, twice: tokens that the sampler and the hinted correction weigh."""
    mask, hinted = micro.completion_mask, micro.hinted[:, None]
    own = mask & ~hinted & ~micro.sampler_logprobs.isnan()
    nothing = torch.zeros_like(mask)
    return (
        own if config.sampler_correction != "none" else nothing,
        mask & hinted if config.hinted_correction != "none" else nothing,
    )


def _without_nan(states: Tensor, mask: Tensor, odd: list[str], whose: str) -> Tensor:
    """Return states (B, T, H) that the losses take; ``odd`` gets ``whose`` if they were not finite.

    On a CPU the losses check this, and would end the run; on a GPU they do not, and their result is
    NaN by itself.
    """
    if states.is_cuda or bool(states.detach().sum(-1, dtype=torch.float64).isfinite()[mask].all()):
        return states
    odd.append(whose)
    return states.nan_to_num(0.0, 0.0, 0.0)


def _now(states: Tensor) -> float:
    """Return the time in seconds, after all that the device of ``states`` was given to do."""
    if states.is_cuda:
        torch.cuda.synchronize(states.device)
    return time.perf_counter()


def _open_hidden(teacher: VLM, micro: Batch, opened: Tensor, odd: list[str]) -> Tensor:
    """Return the teacher's finite states of the open sequences, on the policy's device."""
    prompts = [micro.prompts[place] for place in opened.tolist()]
    with torch.no_grad():
        inputs = teacher.encode(prompts)
        ids, mask = (
            x[opened].to(teacher.device) for x in (micro.completion_ids, micro.completion_mask)
        )
        hidden = teacher.run_wrapped(lambda: teacher.completion_hidden(inputs, ids, mask))
    hidden = _without_nan(hidden, mask, odd, "teacher")
    return hidden.to(micro.completion_ids.device)


def _add(
    totals: StepTotals,
    stats: TokenStats,
    micro: Batch,
    config: ObjectiveConfig,
    ref_logprobs: Tensor | None,
) -> None:
    mask = micro.completion_mask
    totals.tokens += int(mask.sum())
    totals.entropy += float(stats.entropy.sum())
    totals.divergence += float(stats.divergence.sum())
    if ref_logprobs is not None:
        difference = (ref_logprobs - stats.logprobs)[mask]
        totals.kl += float(ESTIMATORS["k3"](difference).sum())
    if micro.old_logprobs is not None:
        ratio = (stats.logprobs - micro.old_logprobs).exp()
        up = mask & (micro.advantages > 0)[:, None]
        down = mask & (micro.advantages < 0)[:, None]
        totals.clipped_high += int((up & (ratio > 1 + config.epsilon_high)).sum())
        totals.clipped_low += int((down & (ratio < 1 - config.epsilon_low)).sum())
        return
    # The first iteration: what trains is what sampled, up to top_p, temperatures and rounding.
    sampled = mask & ~micro.hinted[:, None] & ~micro.sampler_logprobs.isnan()
    if bool(sampled.any()):
        gap = (stats.logprobs - micro.sampler_logprobs)[sampled].abs()
        totals.sampler_gap += float(gap.sum())
        totals.sampler_gap_max = max(totals.sampler_gap_max, float(gap.max()))
        totals.sampled_tokens += int(sampled.sum())
