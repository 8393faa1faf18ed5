"""Heads that PEFT has adapted: the layer that computes, and the factors that LoRA adds to it.

PEFT is not imported: its layers are told by their attributes.
"""

from typing import Any, NamedTuple, NoReturn

from torch import nn

from kepo_kernels.errors import KepoInputError


class Factors(NamedTuple):
    """The two layers of one LoRA: its layer adds scale b(a(x)) to what its base layer computes."""

    a: nn.Linear
    b: nn.Linear
    scale: float


def computing(head: nn.Module) -> nn.Module:
    """Return the layer that an entry of `modules_to_save` passes its input on to, else `head`."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    wrapper: Any = head  # PEFT's, whose attributes nn.Module does not declare
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def is_adapted(layer: nn.Module) -> bool:
    """Return whether the weight of this layer alone does not make its output."""
    # Every tuner layer wraps the layer it adapts, as does the one that trains single tokens.
    return hasattr(layer, "base_layer") or hasattr(layer, "token_adapter")


def factors_of(layer: Any) -> list[Factors]:
    """List the LoRAs of an adapted layer that are active and not merged into its base layer.

    Raises KepoInputError for what is no plain LoRA, as its output is not that of two matrices.
    """
    if not (hasattr(layer, "base_layer") and hasattr(layer, "lora_A")):
        _refuse(layer, "is no LoRA")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward would
    if layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        dropout = layer.lora_dropout[name]
        if name in layer.lora_variant or not isinstance(layer.lora_A[name], nn.Linear):
            _refuse(layer, "is a variant of LoRA")
        if layer.lora_B[name].bias is not None:
            _refuse(layer, "has a lora_bias")
        if layer.training and getattr(dropout, "p", 0.0) > 0.0:
            _refuse(layer, f"has lora_dropout={dropout.p}")
    return [Factors(layer.lora_A[x], layer.lora_B[x], layer.scaling[x]) for x in names]


def _refuse(layer: nn.Module, what: str) -> NoReturn:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    raise KepoInputError(
        f"head_of: PEFT has adapted the LM head ({kind}), and the adapter {what}, which the losses "
        "cannot compute; expected a plain LoRA without dropout and bias: leave lm_head out of the "
        "adapter's targets, or train it in full by modules_to_save"
    )
