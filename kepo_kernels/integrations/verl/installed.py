"""What is put in place of verl's own, and what is added to its registries."""

from typing import Any

from kepo_kernels.integrations.verl.fused_linear import KepoFusedLinear
from kepo_kernels.validate import Validator


def use_kepo(**engine: Any) -> None:
    """Install the fused head and register the losses, once for a process.

    Every process that reads verl's configuration or trains must call it, as its own plug-in
    mechanism does. It changes nothing of a run that does not ask for it: the head is used where
    use_fused_kernels is True and impl_backend is "torch" or "liger", the losses where they are
    named.

    Args:
        **engine: settings of all later calls of the head, as workspace_bytes; see
            `kepo_kernels.losses`.
    """
    if engine:
        KepoFusedLinear.engine = Validator("use_kepo").engine(engine)
    import verl  # noqa: F401  # it may load plugin.py, which installs everything before this goes on
    import verl.models.transformers.monkey_patch as patches
    import verl.utils.experimental.torch_functional as functional
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from kepo_kernels.integrations.verl import distilled, sequence_losses

    if functional.FusedLinearForPPO is KepoFusedLinear:
        return
    # The models' forwards import it when they run.
    functional.FusedLinearForPPO = KepoFusedLinear
    patches.patch_forward_with_backends = distilled.patching(patches.patch_forward_with_backends)
    FSDPEngineWithLMHead.forward_step = distilled.with_teacher(FSDPEngineWithLMHead.forward_step)
    distilled.register()
    sequence_losses.register()
