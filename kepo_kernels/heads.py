"""LM heads: how logits are computed from one, and how a model's own head is found and gathered.

    y = logit_scale (x @ weight^T + scale (x @ a^T) @ b^T + bias)
    logits = softcap tanh(y / softcap)

Every public function takes a plain weight tensor (V, H) or a `Head` for `lm_head` and
`teacher_lm_head`; `head_of` reads one off a model of transformers.
"""

import dis
import inspect
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from kepo_kernels.adapters import Factors, computing, factors_of, is_adapted
from kepo_kernels.errors import KepoInputError
from kepo_kernels.own_logits import LogitChanges, refuse_another_head
from kepo_kernels.versions import refuse_sharding_on_cpu

if TYPE_CHECKING:  # torch may lack torch.distributed
    from torch.distributed.fsdp import FSDPModule


class LoRA(NamedTuple):
    """A low-rank update of a head's weight: weight + scale * b @ a, which is never formed."""

    a: Tensor
    """(r, H) factor, applied to the hidden states first."""
    b: Tensor
    """(V, r) factor, applied second."""
    scale: float = 1.0
    """Factor of the product b @ a."""


@dataclass(frozen=True, eq=False)
class Head:
    """A head's weight and how its logits are computed.

    `weight`, `lora.a` and `lora.b` each receive a gradient only if they require one: a frozen
    weight costs neither a gradient buffer nor a gradient product.
    """

    weight: Tensor
    """(V, H) weight of the head."""
    softcap: float | None = None
    """Logits become softcap tanh(y / softcap). None disables it."""
    logit_scale: float = 1.0
    """Factor of the logits before the softcap (Cohere's logit_scale; 1/x for Granite's)."""
    lora: LoRA | None = None
    """Low-rank update of the weight. None means there is none."""
    bias: Tensor | None = None
    """(V,) bias. None means there is none, or that it is the argument `bias` of the call."""

    @classmethod
    def of(cls, lm_head: "Tensor | Head") -> "Head":
        return lm_head if isinstance(lm_head, Head) else cls(lm_head)


@contextmanager
def lm_head_weight(model: nn.Module) -> Iterator[Tensor]:
    """Yield the whole weight (V, H) of a model's LM head, for a loss computed outside of its
    forward.

        hidden = model(ids)
        with lm_head_weight(model) as weight:
            loss = fused_grpo_loss(hidden, weight, targets, advantages, weights=weights)
        loss.backward()

    `model` may be plain, wrapped by DDP or PEFT, or sharded by `fully_shard` with the head in any
    group, tied or not. Call forward on the wrapper or the sharded root, as usual; then the
    gradients of head and body are those of a single process. DDP and FSDP2 average over processes:
    to divide by a count of tokens, divide by the count over all of them and multiply by their
    number. With DDP's `find_unused_parameters` the loss belongs inside of its forward, else
    backward raises.

    A head that is sharded on entry is gathered, in the `param_dtype` of its mixed precision, and
    sharded again on exit, also after an error: the tensor then has no memory and must not be read.
    Backward may run inside of the block, or after it with every fused loss, which has formed its
    gradients by then. `fused_linear_logprobs` reads the weight in backward: run it inside, or torch
    raises for a storage of size 0. A head that is whole on entry is left as it is.

    Softcap, logit scale and bias are not part of the weight: inside of the block, `head_of(model)`
    is the whole head with them.

    Raises KepoInputError for a model without a head, a head that PEFT has adapted (not one in its
    `modules_to_save`), and FSDP1, ZeRO-3 and tensor-parallel heads; each error says what to do
    instead.
    """
    head = _without_peft(output_layer(model))
    holder = _fsdp2_holder(model, head)
    if holder is not None:
        holder.unshard()
    try:
        yield _whole_weight(head)
    finally:
        if holder is not None:
            holder.reshard()


SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "softcap",
)
"""Settings of transformers' models that cap logits; None or 0 is no cap."""

FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Settings of transformers' models that multiply logits, or divide them (`DIVIDES`)."""

DIVIDES = ("logits_scaling",)
MULTIPLIES_ALL_THE_SAME = ("hyperclovax", "hyperclovax_vision_v2")
"""Model types in which a name of `DIVIDES` is a factor."""

_CHANGES = re.compile(r"soft_?cap|logits?_scal|multiplier", re.IGNORECASE)
"""A pattern for names of settings that change logits."""


def head_of(model: nn.Module) -> Head:
    """Return the LM head of a model of transformers with all that its forward does to logits: bias,
    scale, softcap, and PEFT's LoRA on the head.

        hidden = model.base_model(ids).last_hidden_state
        loss = fused_grpo_loss(hidden, head_of(model), targets, advantages, weights=weights)

    `model` is a causal or an image-text model, plain or wrapped as `lm_head_weight` takes it; call
    it inside of `lm_head_weight` where the head is sharded. A setting counts where the forward
    reads it: the configs of some models have one that only their text-only sisters obey.

    The first call for a model runs two tokens, to see that its forward multiplies the backbone's
    last states and does no more to logits than that. One that is sharded or offloaded is not run.

    Raises KepoInputError for what `lm_head_weight` refuses, for a head that is no linear layer, for
    a forward that changes logits by a setting that is not known here, and for one that does
    something else to states or logits (a transform of BERT's, a mask of Chameleon's).
    """
    layer, inner = output_layer(model), innermost(model)
    changes = logit_changes(inner)
    head = layer_head(layer, changes.softcap, changes.factor * changes.before)
    refuse_another_head(inner, layer, head.weight, changes, _refuse_head)
    return head


def layer_head(layer: nn.Module, softcap: float | None, factor: float) -> Head:
    """Return the head that an output layer is, with its bias and the LoRA that PEFT has put there;
    softcap and factor are those of its model."""
    base, factors = layer_parts(layer)
    lora = None
    if len(factors) == 1:
        a, b, scale = factors[0]
        lora = LoRA(_whole_weight(a), _whole_weight(b), scale)
    elif factors:  # several adapters at once are one of the sum of their ranks
        down = torch.cat([_whole_weight(a) * scale for a, _, scale in factors])
        lora = LoRA(down, torch.cat([_whole_weight(b) for _, b, _ in factors], dim=1))
    return Head(_whole_weight(base), softcap, factor, lora, getattr(base, "bias", None))


def layer_parts(layer: nn.Module) -> tuple[nn.Module, list[Factors]]:
    """Return the linear layer that computes the logits, and the LoRAs on it."""
    layer = computing(layer)
    base, factors = layer, []
    if is_adapted(layer):
        factors = factors_of(layer)
        base = layer.base_layer  # type: ignore[assignment]
    if not isinstance(base, nn.Linear | nn.Embedding):
        _refuse(
            f"the LM head is a {type(base).__name__}, which may do more than multiply; expected a "
            "linear layer: build the Head yourself"
        )
    return base, factors


def logit_changes(model: nn.Module) -> LogitChanges:
    """Return what the settings of an unwrapped model do to its logits.

    A factor counts as one of the states where its forward reads the setting before the head.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return LogitChanges()
    kind = type(model)
    read = _names_read(cast(Hashable, kind))
    named = [name for name in dict.fromkeys(read) if _CHANGES.search(name)]
    unknown = sorted({*named} - {*SOFTCAPS, *FACTORS})
    if unknown:
        _refuse(
            f"the forward of {kind.__name__} reads {', '.join(unknown)}, which may change logits "
            "in a way not known here; build the Head yourself"
        )
    softcap, factors = None, {True: 1.0, False: 1.0}
    head = _attribute_of(model, output_layer(model)) if named else None
    for name in named:
        value = _setting(config, name)
        if value is not None and name in SOFTCAPS:
            softcap = value or None
        elif value is not None:
            divides = name in DIVIDES and config.model_type not in MULTIPLIES_ALL_THE_SAME
            before = head in read and read.index(name) < read.index(head)
            factors[before] *= 1.0 / value if divides else value
    return LogitChanges(softcap, factors[False], factors[True])


@cache
def _names_read(kind: Hashable) -> list[str]:
    """List the names in a model's forward, in the order of its code."""
    forward: Any = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    return [x.argval for x in dis.get_instructions(forward) if isinstance(x.argval, str)]


def _attribute_of(model: nn.Module, layer: nn.Module) -> str | None:
    """Return the model's attribute that is a layer, or that holds it."""
    return next((name.split(".")[0] for name, x in model.named_modules() if x is layer), None)


def _setting(config: Any, name: str) -> float | None:
    """Return a setting of a model's config, or of its text model's."""
    own = getattr(config, name, None)
    value = getattr(config.get_text_config(), name, None) if own is None else own
    return None if value is None else float(value)


def _refuse(message: str) -> NoReturn:
    raise KepoInputError(f"lm_head_weight: {message}")


def _refuse_head(message: str) -> NoReturn:
    raise KepoInputError(f"head_of: {message}")


def output_layer(model: nn.Module) -> nn.Module:
    """Return the LM head of the unwrapped model: `get_output_embeddings()`, else `lm_head`."""
    if not isinstance(model, nn.Module):
        _refuse(f"model is {type(model).__name__}; expected a torch.nn.Module with an LM head")
    inner = _unwrapped(model)
    head = None
    if hasattr(inner, "get_output_embeddings"):
        head = inner.get_output_embeddings()
    if head is None:
        head = getattr(inner, "lm_head", None)
    if not isinstance(head, nn.Module):
        _refuse(
            f"model {type(inner).__name__} has no LM head: get_output_embeddings() and lm_head "
            "give no module; pass the model that holds it, e.g. ...ForCausalLM, not its backbone"
        )
    _refuse_fsdp1(model, head)
    return head


def innermost(model: nn.Module) -> nn.Module:
    """Return the model below DDP's, torch.compile's and PEFT's wrappers."""
    inner = _unwrapped(model)
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()  # PEFT
    return inner


def _unwrapped(model: nn.Module) -> Any:
    """Return the module below the wrappers of DDP and of torch.compile."""
    inner: Any = model  # a wrapper's or a model's own attributes, which nn.Module does not declare
    while True:
        has_head = hasattr(inner, "lm_head") or hasattr(inner, "get_output_embeddings")
        if "_orig_mod" in getattr(inner, "_modules", {}):  # of torch.compile, which passes on names
            inner = inner._orig_mod
        elif not has_head and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            return inner


def _without_peft(head: nn.Module) -> nn.Module:
    """Return the layer whose weight alone produces the logits."""
    head = computing(head)
    if is_adapted(head):
        _refuse(
            f"PEFT has adapted the LM head ({type(head).__module__}.{type(head).__name__}): its "
            "weight alone does not make the logits; for LoRA compute the loss by FusedHead, or "
            "pass head_of(model) to it, else leave lm_head out of the adapter's targets or train "
            "it in full by modules_to_save"
        )
    return head


def _holders(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """List the modules of the model that contain the head, outermost first."""
    return [module for module in model.modules() if any(m is head for m in module.modules())]


def _refuse_fsdp1(model: nn.Module, head: nn.Module) -> None:
    names = [type(module).__name__ for module in _holders(model, head)]
    if "FullyShardedDataParallel" in names:
        _refuse(
            "the LM head is part of a flat parameter of FSDP1 (FullyShardedDataParallel); shard "
            "the model with torch.distributed.fsdp.fully_shard instead, or compute the loss "
            "inside the forward of the module that FSDP1 wraps, from its lm_head.weight there"
        )


def _fsdp2_holder(model: nn.Module, head: nn.Module) -> "FSDPModule | None":
    """Return the module whose FSDP2 group holds the head's shards; None if the weight is not
    sharded now."""
    weight: Any = getattr(head, "weight", None)
    if not is_dtensor(weight):
        return None
    sharded: list[Any] = [module for module in _holders(model, head) if hasattr(module, "unshard")]
    if not sharded:
        _refuse(
            "lm_head.weight is a DTensor, and no module of model was given to fully_shard; pass "
            "the sharded root; a tensor-parallel head is not supported: leave lm_head out of the "
            "plan"
        )
    mesh = weight.device_mesh  # the weight itself may be on the CPU for being offloaded
    reason = refuse_sharding_on_cpu()
    if reason and mesh.device_type == "cpu" and mesh.size() > 1 and torch.is_grad_enabled():
        _refuse(reason)
    return sharded[-1]  # fully_shard gives a parameter to the innermost


def _whole_weight(head: nn.Module) -> Tensor:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        _refuse(f"the LM head ({type(head).__name__}) has no weight; expected a linear layer")
    if is_dtensor(weight):
        _refuse(
            f"lm_head.weight is still a DTensor {list(weight.shape)} after unshard(): the head is "
            "tensor-parallel, which is not supported; leave lm_head out of the plan"
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        _refuse(
            "lm_head.weight is a parameter that DeepSpeed ZeRO-3 has partitioned; compute the loss "
            "by FusedHead, or run it and its backward inside "
            "deepspeed.zero.GatheredParameters([lm_head.weight])"
        )
    if weight.device.type == "meta" and hasattr(head, "_hf_hook"):
        _refuse(
            "lm_head.weight is on meta, as accelerate has offloaded it; compute the loss by "
            "FusedHead, inside of whose forward it is there, or keep lm_head on a device"
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        _refuse(
            f"lm_head.weight {list(weight.shape)} {str(weight.dtype).removeprefix('torch.')}; "
            "expected a floating-point (V, H); a quantized head has to be dequantized first"
        )
    return weight


def is_dtensor(x: object) -> bool:
    """Return whether `x` is a DTensor, judged by its type's name: torch may lack
    torch.distributed."""
    return type(x).__name__ == "DTensor"
