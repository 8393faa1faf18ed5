"""One micro-step: a student forward, a teacher forward on open sequences only, one fused loss."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kepo.batch import Batch
from kepo.config import Config
from kepo.vlm import VLM
from kepo_kernels import TokenStats, fused_grpo_loss, fused_kepo_loss, fused_linear_logprobs


@dataclass
class StepTotals:
    """Sums over the micro-batches of a step, from which its metrics are made."""

    policy_loss: float = 0.0
    distill_loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    divergence: float = 0.0
    tokens: int = 0
    teacher_tokens: int = 0
    teacher_seconds: float = 0.0


def kepo_step(
    policy: VLM,
    teacher: VLM | None,
    ref: VLM | None,
    micro: Batch,
    config: Config,
    totals: StepTotals,
) -> Tensor:
    """The loss of a micro-batch, ready for backward; adds its numbers to ``totals``.

    One student forward feeds the policy term and the divergence. The teacher's backbone and head
    meet the sequences whose gate is open and no others; with every gate closed it does not run.
    """
    micro = micro.to(policy.device)
    ids, mask = micro.completion_ids, micro.completion_mask
    hidden = policy.completion_hidden(policy.encode(micro.prompts), ids, mask)
    settings = dict(
        completion_mask=mask,
        temperature=config.temperature,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        impl=config.impl,
        workspace_bytes=config.workspace_bytes,
        return_stats=True,
    )
    if ref is not None:
        with torch.no_grad():
            ref_hidden = ref.completion_hidden(ref.encode(micro.prompts), ids, mask)
            settings["ref_logprobs"] = fused_linear_logprobs(
                ref_hidden,
                ref.lm_head,
                ids,
                completion_mask=mask,
                temperature=config.temperature,
                impl=config.impl,
                workspace_bytes=config.workspace_bytes,
            )

    if teacher is not None and bool(micro.gate.any()):
        started = time.perf_counter()
        teacher_hidden = _open_hidden(teacher, micro)
        totals.teacher_seconds += time.perf_counter() - started
        totals.teacher_tokens += int(mask[micro.gate].sum())
        loss, stats = fused_kepo_loss(
            hidden,
            policy.lm_head,
            ids,
            micro.advantages,
            teacher_hidden,
            teacher.lm_head,
            gate=micro.gate,
            policy_weights=micro.policy_weights,
            distill_weights=micro.distill_weights,
            distill_coef=config.distill_coef,
            beta=config.beta,
            **settings,
        )
    else:
        loss, stats = fused_grpo_loss(
            hidden,
            policy.lm_head,
            ids,
            micro.advantages,
            weights=micro.policy_weights,
            **settings,
        )
    _add(totals, loss, stats, micro, config, settings.get("ref_logprobs"))
    return loss


def _open_hidden(teacher: VLM, micro: Batch) -> Tensor:
    """The teacher's states of the open sequences, on the policy's device."""
    opened = micro.gate.nonzero().squeeze(-1)
    prompts = [micro.prompts[place] for place in opened.tolist()]
    device = micro.gate.device
    with torch.no_grad():
        hidden = teacher.completion_hidden(
            teacher.encode(prompts),
            micro.completion_ids[opened].to(teacher.device),
            micro.completion_mask[opened].to(teacher.device),
        )
    return hidden.to(device)


def _add(
    totals: StepTotals,
    loss: Tensor,
    stats: TokenStats,
    micro: Batch,
    config: Config,
    ref_logprobs: Tensor | None,
) -> None:
    distill = float((micro.distill_weights * stats.divergence).sum())
    totals.distill_loss += distill
    totals.policy_loss += float(loss.detach()) - config.distill_coef * distill
    totals.tokens += int(micro.completion_mask.sum())
    totals.entropy += float(stats.entropy.sum())
    totals.divergence += float(stats.divergence.sum())
    if ref_logprobs is not None:
        difference = (ref_logprobs - stats.logprobs)[micro.completion_mask]
        totals.kl += float((difference.expm1() - difference).sum())
