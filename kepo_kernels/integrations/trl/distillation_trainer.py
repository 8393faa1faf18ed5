"""KepoDistillationTrainer: TRL's on-policy distillation, with one product per head.

TRL's trainer multiplies each state with both heads two times for a KL, and three times for a JSD.
"""

from typing import Any

import torch
import trl.trainer.distillation_trainer
from torch import Tensor
from trl import DistillationTrainer
from trl.models import prepare_deepspeed

from kepo_kernels.errors import KepoInputError
from kepo_kernels.fused_head import FusedHead
from kepo_kernels.heads import Head, head_of, lm_head_weight
from kepo_kernels.integrations.trl.lora_on_head import lora_on_head
from kepo_kernels.integrations.trl.teacher_of import teacher_of
from kepo_kernels.losses import fused_gated_kd_loss

PICTURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What a batch of TRL's may hold for a model that reads pictures."""


class KepoDistillationTrainer(DistillationTrainer):
    """TRL's DistillationTrainer, whose divergence is `fused_gated_kd_loss`.

        KepoDistillationTrainer("student", "teacher", args=DistillationConfig(beta=0.5), ...)

    Arguments, settings, metrics and results are those of TRL's trainer. The vocabularies of the two
    models may differ in size by their padding: the divergence is over the rows that they share.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        *rest: Any,
        workspace_bytes: int | None = None,
        **kwargs: Any,
    ):
        # TRL refuses vocabularies of different size where it is given a teacher; without one it
        # leaves the teacher to the subclass.
        with lora_on_head(trl.trainer.distillation_trainer):
            super().__init__(model, None, args, *rest, **kwargs)
        if teacher_model is None:
            raise KepoInputError(
                "KepoDistillationTrainer: teacher_model is None; expected a model or its name: a "
                "teacher on a server is for TRL's own trainers"
            )
        self.workspace_bytes = workspace_bytes
        self.teacher_model = self._prepared(teacher_model)
        FusedHead.install(self.model)

    def _prepared(self, teacher: Any) -> Any:
        """Load the teacher if it is a name, and place it as TRL does."""
        settings = self.args.teacher_model_init_kwargs
        if settings is not None and not isinstance(teacher, str):
            raise KepoInputError(
                f"KepoDistillationTrainer: teacher_model is a {type(teacher).__name__} and "
                f"args.teacher_model_init_kwargs is {settings!r}; expected these for a name alone: "
                "leave them out"
            )
        given = _settings_of_teacher(self.args)
        teacher = teacher_of(teacher, self, given)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies and the number of tokens.

        TRL calls it inside of the wrapper's forward.
        """
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        pictures = {name: inputs[name] for name in PICTURES if name in inputs}
        given = ids, attention, mask.size(1)
        hidden = self._get_last_hidden_state(unwrapped_student, *given, **pictures)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            states = self._forward_redirection(
                self.teacher_model,
                teacher,
                self._get_last_hidden_state,
                teacher,
                *given,
                **pictures,
            )
        count = mask.sum()
        tokens = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch

        def divergence(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            device = head.weight.device
            with lm_head_weight(teacher):
                loss, stats = fused_gated_kd_loss(
                    hidden.to(device),
                    head,
                    states.to(device),
                    head_of(teacher),
                    weights=(mask / tokens).to(device),
                    beta=self.beta,
                    temperature=self.temperature,
                    workspace_bytes=self.workspace_bytes,
                    return_stats=True,
                )
            return loss, stats.entropy.sum()

        loss, entropy = FusedHead(unwrapped_student)(hidden, divergence)
        return loss, entropy, count


def _settings_of_teacher(args: Any) -> dict[str, Any]:
    """Return the settings that TRL reads for a teacher that is loaded by its name."""
    settings = dict(args.teacher_model_init_kwargs or {})
    settings.setdefault("dtype", None)
    if args.teacher_model_revision is not None:
        settings.setdefault("revision", args.teacher_model_revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None  # TRL: "auto" fails there
    settings.setdefault("trust_remote_code", args.trust_remote_code)
    return settings
