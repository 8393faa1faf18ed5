"""KepoGRPOTrainer: TRL's GRPO with KEPO's joint loss, a gated teacher in the same pass.

TRL's `_compute_loss` asks the model for log-probabilities and goes on from there. Here the model
answers with detached ones and leaves its joint loss aside; so TRL's own code still writes all
metrics and steers the adaptive entropy bonus, and nothing of it is copied.
"""

import inspect
import logging
import math
from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.grpo_trainer
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import Head, head_of, innermost, output_layer
from kepo_kernels.integrations.trl.grpo_options import (
    entropy_of,
    of_window,
    policy_weights,
    settings_of,
    uncovered,
)
from kepo_kernels.integrations.trl.head_in_forward import fuse_head
from kepo_kernels.integrations.trl.hinted_generation import (
    COMPLETION_IDS,
    COMPLETIONS,
    HintedPrompts,
    failed_groups,
    generate_again,
)
from kepo_kernels.integrations.trl.lora_on_head import lora_on_head
from kepo_kernels.integrations.trl.teacher_of import teacher_of
from kepo_kernels.linear import fused_linear_logprobs
from kepo_kernels.losses import fused_gated_kd_loss, fused_kepo_loss

logger = logging.getLogger(__name__)


class KepoGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer whose loss is `fused_kepo_loss`: GRPO on all completions, distillation
    from a teacher on those that a reward calls good.

        KepoGRPOTrainer(
            "student", [accuracy, concise], teacher_model="teacher", gate_reward="accuracy",
            args=GRPOConfig(...), train_dataset=...
        )

    All arguments and settings of TRL's trainer keep their meaning, and without a teacher the loss
    is TRL's. Where a setting needs more than one pass, log-probabilities come from `fuse_head`, the
    policy's loss from TRL's code and the divergence from `fused_gated_kd_loss`; the log names the
    setting once.

    Args:
        teacher_model: a model, or a name that is loaded like the student. Its tokens are the
            student's. It is held whole by every process. None means no distillation.
        gate_reward: name of the reward function that opens a completion to the teacher. None means
            that all are open.
        gate_threshold: the least reward that opens it. A reward of None closes it.
        distill_coef: factor of the divergence, a mean over the open tokens of an optimiser step.
        distill_beta: 0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD.
        hinted_prompts: a function of prompts, their completions and their rows of the data set,
            called in training for prompts of which no completion is open. It returns a prompt with
            a hint for each, or None; completions to those are sampled, scored and trained on as if
            they had been sampled without. Equal prompts shall get equal hints. None means no hints.
        workspace_bytes: as in `kepo_kernels.losses`.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: Any = None,
        gate_reward: str | None = None,
        gate_threshold: float = 1.0,
        distill_coef: float = 1.0,
        distill_beta: float = 0.5,
        hinted_prompts: HintedPrompts | None = None,
        workspace_bytes: int | None = None,
        **kwargs: Any,
    ):
        for name, value, most in (
            ("gate_threshold", gate_threshold, math.inf),
            ("distill_coef", distill_coef, math.inf),
            ("distill_beta", distill_beta, 1.0),
        ):
            least = -math.inf if name == "gate_threshold" else 0.0
            _check_number(name, value, least, most)
        with lora_on_head(trl.trainer.grpo_trainer):
            super().__init__(*args, **kwargs)
        self._check_head()
        self._check_hints(hinted_prompts, gate_reward)
        self._check_gate(gate_reward)
        self.gate_reward, self.gate_threshold = gate_reward, gate_threshold
        self.distill_coef, self.distill_beta = distill_coef, distill_beta
        self.hinted_prompts, self.workspace_bytes = hinted_prompts, workspace_bytes
        self.teacher_model = None if teacher_model is None else self._teacher(teacher_model)
        fuse_head(self)
        self._uncovered = uncovered(self)
        if self._uncovered and self.accelerator.is_main_process:
            logger.warning(
                "%s is not part of fused_kepo_loss: the policy's loss is TRL's own, on "
                "log-probabilities of the fused head",
                self._uncovered,
            )

    def _check_gate(self, gate_reward: str | None) -> None:
        if gate_reward is None:
            return
        found = self.reward_func_names.count(gate_reward)
        if found != 1:
            raise KepoInputError(
                f"KepoGRPOTrainer: gate_reward is {gate_reward!r}; expected the name of one reward "
                f"function, and {found} are called so: there are "
                + ", ".join(self.reward_func_names)
            )

    def _check_head(self) -> None:
        head: Any = output_layer(self.model)
        if self.args.cast_lm_head_to_fp32 and hasattr(head, "base_layer"):
            raise KepoInputError(
                "KepoGRPOTrainer: cast_lm_head_to_fp32=True is given with an adapter on the LM "
                "head, which TRL's cast leaves out; expected one of them: leave lm_head out of the "
                "adapter's targets"
            )

    def _teacher(self, model: Any) -> Any:
        """Load the teacher if it is a name, and place it."""
        settings = dict(self.args.model_init_kwargs or {})
        settings["device_map"] = None
        settings.setdefault("trust_remote_code", self.args.trust_remote_code)
        settings.setdefault("dtype", self.model.dtype)
        model = teacher_of(model, self, settings)
        return model.to(self.accelerator.device).eval()

    # ---- at the generation: hints, and who is open ----

    def _check_hints(self, hinted_prompts: HintedPrompts | None, gate_reward: str | None) -> None:
        if hinted_prompts is None:
            return
        if not callable(hinted_prompts) or inspect.iscoroutinefunction(hinted_prompts):
            raise KepoInputError(
                f"KepoGRPOTrainer: hinted_prompts is {hinted_prompts!r}; expected a plain function "
                "of prompts, their completions and their rows of the data set"
            )
        if gate_reward is None:
            raise KepoInputError(
                "KepoGRPOTrainer: hinted_prompts is given without gate_reward, which says what a "
                "failed completion is; expected both"
            )
        if self.tools or self.environment_factories or self.rollout_func is not None:
            raise KepoInputError(
                "KepoGRPOTrainer: hinted_prompts is given beside tools, an environment or a "
                "rollout_func; expected completions of one turn: leave one of them out"
            )

    def _generate(self, prompts: Any) -> tuple:
        first = super()._generate(prompts)
        if self.hinted_prompts is None or not self.model.training:
            return first
        rewards = super()._calculate_rewards(
            self._examples, prompts, first[COMPLETIONS], first[COMPLETION_IDS]
        )
        # What these calls have logged would be logged twice.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        failed = failed_groups(self._gate(rewards), self.num_generations)
        given = self.hinted_prompts, super()._generate, prompts, self._examples, first
        replaced = 0
        if bool(failed.any()):  # the same in every process
            first, replaced = generate_again(*given, self._own(failed, prompts).tolist())
        count = self.accelerator.gather(failed.new_tensor([replaced], dtype=torch.float64)).sum()
        self._metrics["train"]["kepo/hinted_share"].append(float(count) / len(failed))
        return first

    def _own(self, gathered: Tensor, prompts: Any) -> Tensor:
        """Return the rows of this process of what TRL has gathered from all."""
        first = self.accelerator.process_index * len(prompts)
        return gathered[first : first + len(prompts)]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._gates = self._gate(self._own(rewards, prompts))
        if self.teacher_model is None:
            self._gates = torch.zeros_like(self._gates)
        return rewards

    def _gate(self, rewards: Tensor) -> Tensor:
        """Return 1.0 for each open completion, from the rewards (N, functions)."""
        if self.gate_reward is None:
            return rewards.new_ones(len(rewards))
        reward = rewards[:, self.reward_func_names.index(self.gate_reward)]
        return (reward >= self.gate_threshold).to(rewards.dtype)  # NaN is not

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._examples = inputs
        output = super()._generate_and_score_completions(inputs)
        opened = (_mask(output) * self._gates.unsqueeze(1)).sum()
        # TRL splits and shuffles a tensor (B,) with the batch; one without dimensions stays.
        output["kepo_gate"] = self._gates
        output["kepo_open_tokens"] = self.accelerator.gather(opened).sum()
        return output

    # ---- at the update ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask, gate = _mask(inputs), inputs["kepo_gate"]
        teacher = self._teacher_part(inputs, mask, gate)
        compute = self._beside_trl if self._uncovered else self._joint
        divergences: list[Tensor] = []
        losses: list[Tensor] = []

        def numbers(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            numbers, divergence = compute(hidden, head, inputs, mask, teacher)
            divergences.append(divergence)
            return numbers

        def answered(**given: Any) -> Any:
            output = model(**given, numbers=numbers)
            losses.append(output.loss)
            return output

        of_trl = super()._compute_loss(answered, inputs)
        if len(divergences) != 1:
            raise KepoInputError(
                "KepoGRPOTrainer: model has another forward than this trainer gave it; expected it "
                "unchanged: another trainer was made with the same model, use the newer one"
            )
        if self.teacher_model is not None:
            self._log_divergence(divergences[0], mask, gate)
        return of_trl + losses[0] if self._uncovered else losses[0]

    def _joint(
        self, hidden: Tensor, head: Head, inputs: dict, mask: Tensor, teacher: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the joint loss, and log-probabilities and entropies without a gradient."""
        old = inputs.get("old_per_token_logps")
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        loss, stats = fused_kepo_loss(
            _before(hidden, mask),
            head,
            inputs["completion_ids"].to(hidden.device),
            inputs["advantages"],
            completion_mask=mask,
            policy_weights=policy_weights(self, mask, inputs),
            old_logprobs=old,
            ref_logprobs=inputs.get("ref_per_token_logps") if self.beta != 0.0 else None,
            sampler_weights=inputs["importance_sampling_ratio"] if corrects else None,
            workspace_bytes=self.workspace_bytes,
            return_stats=True,
            **settings_of(self),
            **entropy_of(self, mask),
            **teacher,
        )
        # TRL exponentiates differences of all tokens before it masks some: these shall be 0.
        outside = torch.zeros_like(stats.logprobs) if old is None else old.to(stats.logprobs)
        log_probs = torch.where(mask != 0, stats.logprobs, outside)
        fields = dict(loss=loss, log_probs=log_probs, entropy=stats.entropy)
        return fields, stats.divergence

    def _beside_trl(
        self, hidden: Tensor, head: Head, inputs: dict, mask: Tensor, teacher: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return log-probabilities and entropies for TRL's own loss, and the divergence as a loss
        to add."""
        states = _before(hidden, mask)
        log_probs, entropy = fused_linear_logprobs(
            states,
            head,
            inputs["completion_ids"].to(hidden.device),
            completion_mask=inputs["completion_mask"],
            temperature=self.temperature,
            return_entropy=True,
            workspace_bytes=self.workspace_bytes,
        )
        fields = dict(loss=log_probs.new_zeros(()), log_probs=log_probs, entropy=entropy)
        if not teacher:
            return fields, torch.zeros_like(log_probs)
        teacher = dict(teacher)
        coefficient, weights = teacher.pop("distill_coef"), teacher.pop("distill_weights")
        loss, stats = fused_gated_kd_loss(
            states,
            head,
            completion_mask=mask,
            weights=weights,
            temperature=self.temperature,
            workspace_bytes=self.workspace_bytes,
            return_stats=True,
            **teacher,
        )
        return fields | {"loss": coefficient * loss}, stats.divergence

    def _teacher_part(self, inputs: dict[str, Any], mask: Tensor, gate: Tensor) -> dict[str, Any]:
        """Return the arguments of the divergence; none if no completion here is open."""
        rows = gate.nonzero().flatten().tolist()
        if self.teacher_model is None or self.distill_coef == 0.0 or not rows:
            return {}
        of_step = of_window(self, inputs["kepo_open_tokens"])
        return dict(
            teacher_hidden=self._teacher_states(_rows(inputs, rows)),
            teacher_lm_head=head_of(self.teacher_model),
            gate=gate,
            distill_weights=mask.double() / of_step,
            distill_coef=self.distill_coef,
            beta=self.distill_beta,
        )

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, Any]) -> Tensor:
        """Return the states (B, C, H_t) by which the teacher predicts each completion token.

        TRL's own method makes the inputs, pictures included; where it expects log-probabilities it
        gets the states.
        """
        teacher: Any = self.teacher_model
        backbone: Any = innermost(teacher).base_model

        def scored(labels: Tensor, fused_lm_head: bool, **given: Any) -> Any:
            states = backbone(**given, use_cache=False).last_hidden_state
            return SimpleNamespace(log_probs=states[:, :-1])

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        pictures = {name: inputs.get(name) for name in PICTURES}
        length = inputs["completion_ids"].size(1)
        states, _, _ = self._get_per_token_logps_and_entropies(
            scored, ids, mask, length, **pictures
        )
        return states

    def _log_divergence(self, divergence: Tensor, mask: Tensor, gate: Tensor) -> None:
        """Log the mean divergence of open tokens and the share of open completions, over all
        processes."""
        sums = [divergence.double().sum(), (mask * gate.unsqueeze(1)).sum(), gate.sum()]
        here = torch.stack([*(x.double() for x in sums), gate.new_tensor(len(gate)).double()])
        total, tokens, opened, all_of_them = self.accelerator.reduce(here, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["kepo/open_share"].append(opened / all_of_them)
        metrics["kepo/divergence"].append(total / tokens if tokens else float("nan"))


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        expected = f"in [{least:g}, {most:g}]" if most < math.inf else f">= {least:g}"
        expected = "a finite number" if least == -math.inf else f"a number {expected}"
        raise KepoInputError(f"KepoGRPOTrainer: {name} is {value!r}; expected {expected}")


PICTURES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What a batch of GRPOTrainer's may hold for a model that reads pictures."""


def _mask(inputs: dict[str, Any]) -> Tensor:
    """Return which completion tokens have a loss."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _before(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the states that predict the completion's tokens, the last of each sequence."""
    return hidden[:, -mask.size(1) - 1 : -1]


def _rows(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Pick sequences of a batch, pictures of several sizes included."""
    if len(rows) == len(inputs["completion_ids"]):
        return inputs
    apart = split_pixel_values_by_grid({k: v for k, v in inputs.items() if v is not None})

    def picked(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value if value.dim() == 0 else value[rows]

    return unsplit_pixel_values_by_grid({name: picked(value) for name, value in apart.items()})
