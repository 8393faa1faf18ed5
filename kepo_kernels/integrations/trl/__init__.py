"""The losses in TRL's trainers.

    from kepo_kernels.integrations.trl import KepoDistillationTrainer, KepoGRPOTrainer, fuse_head

What TRL computes from the logits, our kernels compute here; generation, rewards, advantages,
metrics and logs stay TRL's own code.
"""

from kepo_kernels.integrations.trl.supported import refuse_other_releases

refuse_other_releases()  # before any of TRL's private names is asked for

from kepo_kernels.integrations.trl.distillation_trainer import KepoDistillationTrainer  # noqa: E402
from kepo_kernels.integrations.trl.grpo_trainer import KepoGRPOTrainer  # noqa: E402
from kepo_kernels.integrations.trl.head_in_forward import fuse_head  # noqa: E402

__all__ = ["KepoDistillationTrainer", "KepoGRPOTrainer", "fuse_head"]
