"""One micro-step: a student forward, and one fused loss with what teacher and reference said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kepo.models.vlm import VLM
from kepo.objective.batch import Batch
from kepo.objective.credit import correction_weights, hinted_weights
from kepo.objective.score import FrozenScores, finite, logprobs_of, softmax
from kepo.objective.sod import drift_weights
from kepo.objective.totals import StepTotals
from kepo.sections import ObjectiveConfig
from kepo.teachers.served import ServedTeacher
from kepo.teachers.several import Teacher, Teachers, each_of
from kepo_kernels import TokenStats, fused_kepo_loss
from kepo_kernels.compute.devices import moved
from kepo_kernels.objectives.policy import ESTIMATORS

_WEIGHING = ("truncate", "shape")
"""The choices of hinted_correction that weight tokens; "clip" changes what their ratio is to."""


def kepo_step(
    policy: VLM,
    teachers: Teachers,
    micro: Batch,
    scores: FrozenScores,
    config: ObjectiveConfig,
    totals: StepTotals,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a micro-batch, ready for backward, and its (B, T) detached
    log-probabilities.

    One student forward feeds the policy term and the divergence; of the teacher only the head is
    read, its states are in ``scores``, or what a server said in their place. Call it through
    `VLM.run_wrapped` if the policy is spread over ranks. Adds the numbers of the micro-batch to
    ``totals``.

    ``micro`` is on the CPU and stays there: what decides which rows exist is read without waiting
    for the device. Where a model's states are not finite the loss is NaN, on every device: the
    caller sees it in the gradients, and skips the step.
    """
    there, scores = micro.to(policy.device), scores.to(policy.device)
    mask = micro.completion_mask
    hidden = policy.completion_states(micro.prompts, micro.completion_ids, mask)
    hidden, good = finite(hidden, mask)
    odd = scores.odd if good else ("student", *scores.odd)
    before = _before(policy, hidden.detach(), micro, there, config)
    sampler_weights = _sampler_weights(before, micro, there, config, totals)
    old_logprobs = _old_logprobs(before, micro, there, config)
    distillation = _distillation(policy, teachers, hidden.detach(), micro, there, scores, config)
    loss, stats = fused_kepo_loss(
        hidden,
        policy.head,
        there.completion_ids,
        there.advantages,
        completion_mask=mask,
        policy_weights=micro.policy_weights,
        distill_coef=config.distill_coef,
        beta=config.beta,
        old_logprobs=old_logprobs,
        ref_logprobs=scores.ref_logprobs,
        sampler_weights=sampler_weights,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        kl_bias_correction=config.kl_bias_correction,
        entropy_coef=config.entropy_coef,
        policy_loss=config.policy_loss,
        importance_level=config.importance_level,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        grad_tol=config.grad_tol,
        return_stats=True,
        **distillation,
        **softmax(config),
    )
    if odd:
        if not totals.odd_micros:  # said once in a step
            print(
                f"states of the {' and the '.join(odd)} are not finite: look at its weights and at "
                "preprocessor_config.json"
            )
        totals.odd_micros += 1
        loss = loss * torch.nan
    _add(totals, loss, stats, distillation, old_logprobs, micro, there, scores, config)
    return loss, stats.logprobs


@torch.no_grad()
def with_old_logprobs(
    policy: VLM, micro: Batch, config: ObjectiveConfig, totals: StepTotals
) -> Batch:
    """Return a micro-batch that is trained on after other updates, with the log-probabilities from
    before them: call it before the first. Adds its distance from the sampler to ``totals``."""
    there, mask = micro.to(policy.device), micro.completion_mask
    states = policy.completion_states(micro.prompts, micro.completion_ids, mask)
    logprobs = logprobs_of(policy, finite(states, mask)[0], there.completion_ids, mask, config)
    _add_sampler_gap(totals, logprobs, micro, there)
    return replace(micro, old_logprobs=logprobs)


def _before(
    policy: VLM, hidden: Tensor, micro: Batch, there: Batch, config: ObjectiveConfig
) -> Tensor | None:
    """Return (B, T) log-probabilities of before the step's first update, where a correction reads
    them; None if none does."""
    if there.old_logprobs is not None:
        return there.old_logprobs
    own, hinted = _to_correct(micro, config)
    read = own | hinted
    if _ratio_to_hinted(micro, config):
        read = micro.completion_mask
    if not bool(read.any()):
        return None
    return logprobs_of(policy, hidden, there.completion_ids, read, config)


def _ratio_to_hinted(micro: Batch, config: ObjectiveConfig) -> bool:
    return config.hinted_correction == "clip" and bool(micro.hinted.any())


def _old_logprobs(
    before: Tensor | None, micro: Batch, there: Batch, config: ObjectiveConfig
) -> Tensor | None:
    """Return (B, T) log-probabilities that the policy ratio divides by; None in the first
    iteration, where the ratio is 1.

    With hinted_correction "clip" a hinted token has the log-probability it was drawn with.
    (Guide-GRPO, arXiv 2506.13923.)
    """
    if before is None or not _ratio_to_hinted(micro, config):
        return there.old_logprobs
    hinted = micro.completion_mask & micro.hinted[:, None]
    return torch.where(moved(hinted, before.device), there.sampler_logprobs, before)


def _sampler_weights(
    before: Tensor | None,
    micro: Batch,
    there: Batch,
    config: ObjectiveConfig,
    totals: StepTotals,
) -> Tensor | None:
    """Return (B, T) factors of the policy loss of tokens that another distribution sampled; None if
    none did.

    Adds the sampler's ratios to ``totals``.
    """
    own, hinted = _to_correct(micro, config)
    if before is None or not bool((own | hinted).any()):
        return None
    own_there, hinted_there = moved(own, before.device), moved(hinted, before.device)
    weights = correction_weights(before, there.sampler_logprobs, own_there, config.sampler_cap)
    if config.hinted_correction in _WEIGHING:
        weights = weights * hinted_weights(
            before,
            there.sampler_logprobs,
            hinted_there,
            config.hinted_correction,
            config.hinted_cap,
            config.hinted_gamma,
        )
    if bool(own.any()):
        ratios = torch.where(own_there, weights, 0.0)
        totals.add("ratio", ratios)
        totals.reach("ratio_max", ratios)
        totals.ratio_tokens += int(own.sum())
    return weights


def _distillation(
    policy: VLM,
    teachers: Teachers,
    hidden: Tensor,
    micro: Batch,
    there: Batch,
    scores: FrozenScores,
    config: ObjectiveConfig,
) -> dict[str, Any]:
    """Return the teacher's arguments for the loss; none if every gate is closed."""
    if scores.teacher_hidden is None:
        return {}
    weights = _distill_weights(micro, scores)
    is_open = micro.opened if scores.distilled is None else scores.distilled.any(-1)
    [place] = micro.teacher[is_open].unique().tolist()
    teacher = each_of(teachers)[place]
    if scores.teacher_logprobs is not None:
        opened = is_open.nonzero().squeeze(-1)
        ids, mask = micro.completion_ids[opened], micro.completion_mask[opened]
        opened = moved(opened, hidden.device)
        states, own_ids = hidden[opened], there.completion_ids[opened]
        factors = drift_weights(
            policy.tokenizer,
            ids,
            logprobs_of(policy, states, own_ids, mask, config),
            scores.teacher_logprobs,
            mask,
        )
        weights = moved(weights, hidden.device)
        weights = weights.index_copy(0, opened, weights[opened] * factors)
    return dict(
        teacher_hidden=scores.teacher_hidden,
        **_head(teacher, config),
        distill_weights=weights,
    )


def _distill_weights(micro: Batch, scores: FrozenScores) -> Tensor:
    """Return (B, T) weights of the divergence, on the CPU, 0 where ``distill_tokens`` leaves a
    token out."""
    if scores.distilled is None:
        return micro.distill_weights
    return torch.where(scores.distilled, micro.distill_weights, 0.0)


def _head(teacher: Teacher, config: ObjectiveConfig) -> dict[str, Any]:
    """Return the arguments of the loss that make a distribution of a teacher's states; none for a
    server, which says log-probabilities."""
    if isinstance(teacher, ServedTeacher):
        return {}
    return dict(teacher_lm_head=teacher.head, teacher_temperature=config.teacher_temperature)


def _to_correct(micro: Batch, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return (B, T) bool, twice: tokens that the sampler and the hinted correction weigh."""
    mask, hinted = micro.completion_mask, micro.hinted[:, None]
    own = mask & ~hinted & ~micro.sampler_logprobs.isnan()
    nothing = torch.zeros_like(mask)
    return (
        own if config.sampler_correction != "none" else nothing,
        mask & hinted if config.hinted_correction in _WEIGHING else nothing,
    )


def _add(
    totals: StepTotals,
    loss: Tensor,
    stats: TokenStats,
    distillation: dict[str, Any],
    old_logprobs: Tensor | None,
    micro: Batch,
    there: Batch,
    scores: FrozenScores,
    config: ObjectiveConfig,
) -> None:
    """Add the numbers of a micro-batch; outside the mask all statistics are 0."""
    mask = there.completion_mask
    totals.add("policy_loss", loss)
    if distillation:
        weights = moved(distillation["distill_weights"], stats.divergence.device)
        distilled = weights * stats.divergence
        totals.add("distill_loss", distilled)
        totals.add("policy_loss", -config.distill_coef * distilled)
        totals.distilled_tokens += int(_distill_weights(micro, scores).count_nonzero())
    totals.tokens += int(micro.completion_mask.sum())
    totals.add("entropy", stats.entropy)
    totals.add("divergence", stats.divergence)
    if scores.ref_logprobs is not None:
        difference = torch.where(mask, scores.ref_logprobs - stats.logprobs, 0.0)
        totals.add("kl", ESTIMATORS["k3"](difference))
    if old_logprobs is not None:
        ratio = (stats.logprobs - old_logprobs).exp()
        up = mask & (there.advantages > 0)[:, None]
        down = mask & (there.advantages < 0)[:, None]
        totals.add("clipped_high", up & (ratio > 1 + config.epsilon_high))
        totals.add("clipped_low", down & (ratio < 1 - config.epsilon_low))
    if there.old_logprobs is None:
        _add_sampler_gap(totals, stats.logprobs, micro, there)


def _add_sampler_gap(totals: StepTotals, logprobs: Tensor, micro: Batch, there: Batch) -> None:
    """Add the distance of the policy's log-probabilities, from before any update, from those of the
    sampler: what trains is what sampled, up to top_p, temperatures and rounding."""
    sampled = micro.completion_mask & ~micro.hinted[:, None] & ~micro.sampler_logprobs.isnan()
    if bool(sampled.any()):
        gap = (logprobs - there.sampler_logprobs).abs()
        gap = torch.where(moved(sampled, gap.device), gap, 0.0)
        totals.add("sampler_gap", gap)
        totals.reach("sampler_gap_max", gap)
        totals.sampled_tokens += int(sampled.sum())
