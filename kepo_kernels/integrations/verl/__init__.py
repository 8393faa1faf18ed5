"""The losses in verl, past one node: its head, its losses, its rollouts.

    export VERL_USE_EXTERNAL_MODULES=kepo_kernels.integrations.verl.plugin

verl is imported by `use_kepo`, and by the modules that it installs.
"""

from kepo_kernels.integrations.verl.known_releases import refuse_unknown_releases

refuse_unknown_releases()

from kepo_kernels.integrations.verl.fused_linear import KepoFusedLinear  # noqa: E402
from kepo_kernels.integrations.verl.installed import use_kepo  # noqa: E402

__all__ = ["KepoFusedLinear", "use_kepo"]
