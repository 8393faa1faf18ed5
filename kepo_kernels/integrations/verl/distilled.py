"""Distillation from a served teacher's top-k tokens, computed in the student's head.

verl asks its teacher for the K most likely tokens of every position and computes, from whole
logits, a forward KL without a tail. Here the tokens reach the LM head, whose one product gives
log-probabilities, entropy and the divergence of `kepo_kernels.TopK`. They travel through verl's
own places for them: a head's answer is the model output's `fused_linear_aux`, which its engine
reads, and which FSDP sees as an output of the model.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    is_distillation_enabled,
    register_distillation_loss,
)
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils.metric import AggregationType, Metric
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.utils.padding import no_padding_2_padding

from kepo_kernels.errors import KepoInputError
from kepo_kernels.integrations.verl.fused_linear import TeacherTokens, teacher_now, teaching
from kepo_kernels.rows.top_k_rows import TopK

BETAS = {"kepo_forward_kl": 0.0, "kepo_jsd": 0.5, "kepo_reverse_kl": 1.0}
"""Divergences by loss_mode."""
ESTIMATORS = {"kepo_k1": "k1", "kepo_k2": "k2", "kepo_k3": "k3"}
"""verl's own estimators on the sampled tokens, 0 where the gate is closed."""
CLOSED = -1
"""The id of every token of a rollout whose teacher was not asked: a TopK's padding, so that the
tail is all there is, and the divergence 0."""


def register() -> None:
    """Give the losses their names."""
    names = dict(names=list(BETAS), use_topk=True)
    register_distillation_loss(DistillationLossSettings(**names))(divergence)
    names = dict(names=list(ESTIMATORS), use_estimator=True)
    register_distillation_loss(DistillationLossSettings(**names))(estimator)


def with_teacher(forward_step: Callable) -> Callable:
    """Return an engine's forward_step that has its micro-batch's teacher heard in the head."""

    @wraps(forward_step)
    def step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        with teaching(_teacher_of(micro_batch, loss_function)):
            return forward_step(self, micro_batch, loss_function, forward_only)

    return step


def patching(patch_forward: Callable) -> Callable:
    """Return verl's patch_forward_with_backends, after which a forward also returns the answer."""

    @wraps(patch_forward)
    def patch(model: Any, use_fused_kernels: bool = False, fused_kernels_backend: Any = None):
        patch_forward(model, use_fused_kernels, fused_kernels_backend)
        if use_fused_kernels and fused_kernels_backend in ("torch", "liger"):
            model.__class__.forward = _with_answer(model.__class__.forward)

    return patch


def _with_answer(forward: Callable) -> Callable:
    @wraps(forward)
    def answering(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, teacher = forward(self, *args, **kwargs), teacher_now()
        if teacher is None or teacher.answer is None:
            return output
        fields = {x.name: getattr(output, x.name) for x in dataclasses.fields(output)}
        kind: Any = type(output)  # hashable, which mypy does not see
        return _answering(kind)(**fields, fused_linear_aux=teacher.answer)

    return answering


@cache
def _answering(output: type) -> type:
    """Return the dataclass of this output with the field that verl's engine reads."""
    field = ("fused_linear_aux", Any, dataclasses.field(default=None))
    return dataclasses.make_dataclass(f"{output.__name__}WithTeacher", [field], bases=(output,))


def _teacher_of(data: Any, loss_function: Any) -> TeacherTokens | None:
    """Return the teacher of a micro-batch that one of our divergences is asked for."""
    config = getattr(loss_function, "keywords", {}).get("distillation_config")
    if config is None or not is_distillation_enabled(config) or "teacher_ids" not in data:
        return None
    loss = config.distillation_loss
    if loss.loss_mode not in BETAS:
        return None
    ids, logprobs = data["teacher_ids"].values(), data["teacher_logprobs"].values()
    given = [x.unsqueeze(0) for x in (ids, logprobs, _predicts_response(data, len(ids)))]
    if get_ulysses_sequence_parallel_world_size() > 1:
        given = [slice_input_tensor(x, dim=1) for x in given]
    return TeacherTokens(TopK(*given[:2]), given[2], BETAS[loss.loss_mode])


def _predicts_response(data: Any, rows: int) -> Tensor:
    """Return which of the packed positions (N,) predict a token of response_mask."""
    positions = no_padding_2_padding(torch.arange(rows), data)
    found = torch.zeros(rows, dtype=torch.bool)
    found[positions[_response_mask(data).to(positions.device)]] = True
    return found


def _response_mask(data: Any) -> Tensor:
    mask = data["response_mask"].bool()
    return mask.to_padded_tensor(False) if mask.is_nested else mask


def divergence(
    config: Any, distillation_config: Any, model_output: dict, data: Any
) -> tuple[Tensor, dict]:
    """Return the divergence of every response token, (B, T), as the head has computed it."""
    loss, teacher = distillation_config.distillation_loss, teacher_now()
    if teacher is None or teacher.answer is None or "distillation_losses" not in model_output:
        raise KepoInputError(
            f"distillation.distillation_loss.loss_mode={loss.loss_mode} is computed in the LM head "
            "of verl's FSDP engine, and was not; expected use_fused_kernels=True, "
            "fused_kernel_options.impl_backend=torch and use_remove_padding=True in "
            "actor_rollout_ref.model, and actor.strategy fsdp or fsdp2"
        )
    if loss.log_prob_min_clamp is not None:
        raise KepoInputError(
            f"distillation.distillation_loss.log_prob_min_clamp={loss.log_prob_min_clamp} is given "
            f"beside loss_mode={loss.loss_mode}, which has a tail and needs no bound; expected null"
        )
    mask = _response_mask(data)
    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    open_rows = no_padding_2_padding(_is_open(data), data).to(mask.device) & mask
    mass = no_padding_2_padding(model_output["teacher_mass"], data)[open_rows]
    metrics = _opened(open_rows, mask)
    if mass.numel():
        metrics["distillation/teacher_mass"] = Metric(AggregationType.MEAN, mass.mean())
        metrics["distillation/teacher_mass_min"] = Metric(AggregationType.MIN, mass.min())
    return losses, metrics


def estimator(
    config: Any, distillation_config: Any, model_output: dict, data: Any
) -> tuple[Tensor, dict]:
    """Return verl's estimate of the reverse KL of every response token, (B, T), 0 where the gate
    is closed."""
    loss = distillation_config.distillation_loss
    if loss.loss_mode == "kepo_k1" and not loss.use_policy_gradient:
        raise KepoInputError(
            "distillation.distillation_loss.loss_mode=kepo_k1 has a gradient that does not depend "
            "on the teacher; expected use_policy_gradient=True, or kepo_k3"
        )
    student = no_padding_2_padding(model_output["log_probs"], data)
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    mask = _response_mask(data)
    open_rows = no_padding_2_padding(_is_open(data), data).to(mask.device) & mask
    estimates = kl_penalty(student, teacher, ESTIMATORS[loss.loss_mode])
    return torch.where(open_rows, estimates, 0.0), _opened(open_rows, mask)


def _is_open(data: Any) -> Tensor:
    return (data["teacher_ids"].values() != CLOSED).any(-1)


def _opened(open_rows: Tensor, mask: Tensor) -> dict:
    share = open_rows.sum() / mask.sum().clamp(min=1)
    return {"distillation/open_tokens": Metric(AggregationType.MEAN, share)}
