"""Rollouts whose teacher is asked only where the reward says so: KEPO's gate, in verl's workers."""

from typing import Any

import ray
import torch
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from kepo_kernels.errors import KepoInputError
from kepo_kernels.integrations.verl.distilled import BETAS, CLOSED, ESTIMATORS


class GatedAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """verl's worker, which asks no teacher about rollouts of a reward below kepo.gate_threshold.

    A closed rollout has teacher tensors of the usual shapes: ids of -1 and log-probabilities of 0,
    which our distillation losses read as 0.
    """

    async def _compute_teacher_logprobs(
        self,
        output: Any,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not self.distillation_enabled or validate or self._is_open(output.reward_score):
            await super()._compute_teacher_logprobs(
                output, prompt_ids, response_ids, validate, sample_kwargs
            )
            return
        loss = self.teacher_server_manager.distillation_loss_config
        shape = len(prompt_ids) + len(response_ids), loss.topk if loss.loss_settings.use_topk else 1
        output.extra_fields["teacher_ids"] = torch.full(shape, CLOSED, dtype=torch.int32)
        output.extra_fields["teacher_logprobs"] = torch.zeros(shape)

    def _is_open(self, reward: float | None) -> bool:
        mode = self.teacher_server_manager.distillation_loss_config.loss_mode
        if mode not in {*BETAS, *ESTIMATORS}:
            raise KepoInputError(
                f"distillation.distillation_loss.loss_mode={mode} reads a teacher of every "
                "rollout, and the gate leaves some out; expected one of "
                f"{', '.join([*BETAS, *ESTIMATORS])}"
            )
        threshold = self.config.get("kepo", {}).get("gate_threshold", 1.0)
        if reward is None:
            raise KepoInputError(
                f"kepo.gate_threshold={threshold} found a rollout without a reward; expected a "
                "reward function, or a reward model with a resource pool of its own, which verl "
                "asks before the teacher"
            )
        return reward >= threshold  # never of a NaN


class GatedAgentLoopManager(AgentLoopManagerTQ):
    """For actor_rollout_ref.rollout.agent.agent_loop_manager_class."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(GatedAgentLoopWorker)
