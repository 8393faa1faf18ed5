"""FusedHead: losses computed inside the forward of a model's LM head.

Whatever holds a model in pieces (FSDP2, ZeRO-3) gathers a layer's weight around that layer's own
forward, again before its backward, and then reduces its gradient. DDP does the latter for what its
forward has seen. So a loss that is computed *inside* these forwards gets the gradients of a single
process, and no weight has to be gathered by hand.
"""

import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import (
    Head,
    innermost,
    is_dtensor,
    layer_head,
    layer_parts,
    logit_changes,
    output_layer,
)
from kepo_kernels.own_logits import LogitChanges, probe_of, refuse_other_logits

Loss = Callable[[Tensor, Head], Any]
"""A function of the hidden states (B, T, H) and the head, whole. What it returns comes back from
the call: a loss, or tuples, lists and dicts of tensors (hooks find no tensor in other objects)."""

OWN = "_forwards_of_fused_head"
"""Attribute of a patched module: the forward that its instance had, or None, and ours."""

SLOTS = ("_old_forward", "forward")
"""Attributes in which a forward may be. accelerate's hooks, which bring the weights of an offloaded
layer and take them away again, stand in the second and call the first."""

PROBED = "_probed_by_fused_head"
"""Attribute of a patched model whose logits have been found to be those of its head."""


class FusedHead:
    """A model whose LM head computes losses in place of logits.

        FusedHead.install(model)            # before or after DDP, fully_shard, accelerate
        how = dict(targets=ids[:, 1:], advantages=advantages)
        loss = model(ids, loss=lambda hidden, head: fused_grpo_loss(hidden[:, :-1], head, **how))
        loss.backward()

    `model(**inputs, loss=function)` runs the model's own forward, in which the LM head computes
    `function(hidden, head)` in place of logits: of the states (B, T, H) that arrive there, and of
    the whole head as `head_of` reads it: softcap, scale, bias and PEFT's LoRA included. It returns
    what the function returns. Call the wrapper, not the model inside of it. Any loss of this
    package fits, and any number of them. `logits_to_keep` cuts the states as it cuts logits;
    `labels` belong into the function, and an encoder-decoder model takes `decoder_input_ids`.

    `model.lm_head(hidden, loss=function)` is the same without the backbone, for a forward of your
    own: call it inside of that forward, so that the wrapper's hooks know of it.

    Calls without `loss` are untouched, generation among them, and so are the names of parameters,
    what is saved, and whether the head is tied. Deep copies take a loss, too; to pickle the model
    itself in place of its `state_dict()`, `remove` it first.

    DDP and FSDP2 average gradients over processes: to divide by a count of tokens, divide by the
    count over all of them and multiply by their number.

    A call raises KepoInputError for a forward that has not come to its LM head, and the first one
    for a forward that does more to logits than a scale and a softcap.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        """The model below all wrappers."""

    @classmethod
    def install(cls, model: nn.Module) -> "FusedHead":
        """Let a model and its LM head take `loss`; a second call changes nothing.

        `model` may be plain or wrapped by DDP, accelerate, PEFT or `torch.compile`, or sharded by
        `fully_shard`. Install after PEFT has wrapped it. A forward that has an argument `loss` of
        its own is left alone.

        Raises KepoInputError for what `head_of` refuses at once, and for FSDP1.
        """
        output_layer(model)  # with the wrappers, among which it refuses FSDP1
        inner = innermost(model)
        _fused_layer(inner)
        signature = inspect.signature(inner.forward)
        if "loss" not in signature.parameters and OWN not in inner.__dict__:
            _replace(inner, _model_forward(signature))
        return cls(inner)

    def __call__(self, hidden: Tensor, loss: Loss) -> Any:
        """Return `loss(hidden, head)`, computed inside the forward of the model's LM head, whatever
        its name is."""
        return _fused_layer(self.model)(hidden, loss=loss)

    def remove(self) -> None:
        """Give the model and its head their own forwards back.

        Raises KepoInputError where another library has replaced a forward since.
        """
        patched: list[Any] = [module for module in self.model.modules() if OWN in module.__dict__]
        for module in patched:
            if _slot_of(module) is None:
                raise KepoInputError(
                    f"FusedHead.remove: the forward of {type(module).__name__} has been replaced "
                    "since FusedHead.install; undo that first"
                )
        for module in patched:
            slot = _slot_of(module) or "forward"
            before, _ = module.__dict__.pop(OWN)
            module.__dict__.pop(PROBED, None)
            if before is None and slot == "forward":
                del module.forward
            else:
                setattr(module, slot, before or MethodType(type(module).forward, module))


# ---- forwards that take a loss ----


def _fused_layer(model: nn.Module) -> nn.Module:
    """Return the LM head of an unwrapped model, which takes `loss`.

    It is looked up at every call, as PEFT may have wrapped it since.
    """
    layer: Any = output_layer(model)
    each = _computing(layer)
    if any(OWN not in x.__dict__ for x in each):
        for x in each:
            _open(x, logit_changes(model))
    return layer


def _computing(layer: Any) -> list[nn.Module]:
    """List the modules of which one computes what this layer returns: PEFT's entry of
    modules_to_save passes its arguments on to the copy of the active adapter."""
    copies = hasattr(layer, "modules_to_save") and hasattr(layer, "original_module")
    return [layer.original_module, *layer.modules_to_save.values()] if copies else [layer]


def _open(layer: nn.Module, changes: LogitChanges) -> None:
    """Let a layer take `loss`, if it does not yet; `changes` are those of its model."""
    if OWN in layer.__dict__:
        return
    layer_parts(layer)  # refuses now what it would refuse in every call

    def forward(self: nn.Module, *args: Any, loss: Loss | None = None, **kwargs: Any) -> Any:
        if loss is not None:
            return _loss_inside(self, args[0], loss, changes)
        call = _now.call
        if call is not None and call.is_for(self):
            return call.compute(self, args[0], changes)
        return _plain(self, *args, **kwargs)

    _replace(layer, forward)


def _loss_inside(layer: nn.Module, hidden: Tensor, loss: Loss, changes: LogitChanges) -> Any:
    """Return `loss(hidden, head)`, within the forward of a layer that is the head."""
    base, factors = layer_parts(layer)
    parts = [base, *(x for a, b, _ in factors for x in (a, b))]

    def then(hidden: Tensor) -> Any:
        for part in parts:
            _refuse_shards(part)
        return loss(hidden, layer_head(layer, changes.softcap, changes.factor))

    if base is layer:
        return then(hidden)
    # The weights of a LoRA are those of three layers, and each may be gathered around its own
    # forward alone. So the loss is computed inside of all of these.
    for part in parts:
        _open(part, changes)
    return _inside(parts, hidden, then)


def _inside(layers: list[nn.Module], hidden: Tensor, then: Callable[[Tensor], Any]) -> Any:
    """Return `then(hidden)`, computed inside the forwards of these layers, which take `loss`."""
    if not layers:
        return then(hidden)
    first, *others = layers
    return first(hidden, loss=lambda x, _: _inside(others, x, then))


def _model_forward(signature: inspect.Signature) -> Callable:
    """Return a forward that has the head's loss computed, or without `loss` is the model's own."""
    names = list(signature.parameters)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    caches = "use_cache" in names or inspect.Parameter.VAR_KEYWORD in kinds

    def forward(self: nn.Module, *args: Any, loss: Loss | None = None, **kwargs: Any) -> Any:
        if loss is None:
            for name, x in kwargs.items():  # a loss under another name, which **kwargs would take
                if name not in names and inspect.isroutine(x):
                    _refuse(f"{name} is a function; expected it as loss=...")
            return _plain(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {name: x for name, x in given.items() if x is not None}
        if "labels" in given:
            raise KepoInputError(
                "FusedHead: labels are given beside loss, which takes the place of the model's own "
                "loss; expected one of them: take labels from the inputs into the function"
            )
        given.pop("num_items_in_batch", None)  # what the Trainer gives the model's own loss
        return _through(self, loss, {"use_cache": False} | given if caches else given)

    # What asks for the signature (the Trainer to choose columns, generate) is to find the model's.
    # functools.wraps would do that, too; but accelerate unwraps down to what is wrapped.
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = signature.replace(parameters=[this, *signature.parameters.values()])
    forward.__signature__ = own  # type: ignore[attr-defined]
    return forward


# ---- a loss on its way to the head ----


class _Call:
    """One call of a model with a loss, which goes through the model's own forward.

    That forward may be wrapped, to cast or to move weights, and it knows what the states are that
    the head multiplies. So it is run as it is, and its head computes the loss. What the loss
    returned is the head's output for the hooks of whatever shards it; behind them, the forward goes
    on with logits of no tokens, or the first time with a probe.
    """

    def __init__(self, loss: Loss, heads: list[nn.Module], probes: bool):
        self.loss, self.heads, self.probes = loss, heads, probes
        self.taken = self.computed = self.kept = False
        self.weight: Any = None
        self.probe: Tensor | None = None
        self.result: Any = None

    def is_for(self, layer: nn.Module) -> bool:
        return not self.taken and any(layer is x for x in self.heads)

    def compute(self, layer: nn.Module, hidden: Tensor, changes: LogitChanges) -> Any:
        """Return what the loss does, within the head's forward."""
        self.taken = True  # by the head: what the loss itself calls is none of it

        def loss(hidden: Tensor, head: Head) -> Any:
            self.weight = len(head.weight), head.weight.device
            return self.loss(hidden, head)

        if self.probes:
            _refuse_another_product(layer, hidden)
        result = _loss_inside(layer, hidden, loss, changes)
        self.computed = True
        return result

    def keep(self, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Keep the loss, as the last of the head's hooks, and return what stands in for logits."""
        if not self.computed:
            return None  # of a plain call inside of the loss
        if self.kept:
            _refuse("the forward of the model calls its LM head twice; expected one call")
        self.kept, self.result = True, output
        if not self.probes:
            return args[0].new_empty(*args[0].shape[:-1], 0)
        self.probe = probe_of(self.weight[0], args[0].dim(), self.weight[1])
        return self.probe.clone()  # which a forward may change in place


class _Now(threading.local):
    call: _Call | None = None


_now = _Now()
"""The call of this thread that has not yet come to its head, if there is one."""


def _through(model: nn.Module, loss: Loss, given: dict[str, Any]) -> Any:
    """Return the loss that a model's head computes when the model's own forward calls it."""
    layer = _fused_layer(model)
    call = _Call(loss, _computing(layer), probes=PROBED not in model.__dict__)
    if call.probes:
        _refuse_shards_between(model, layer)
    hook = layer.register_forward_hook(call.keep)  # at every call, so that it is the last of all
    outer, _now.call = _now.call, call
    try:
        output = _plain(model, **given)
    finally:
        _now.call = outer
        hook.remove()
    if not call.kept:
        _refuse(
            f"the forward of {type(model).__name__} has not called its LM head, so that loss was "
            "never used; expected a model that makes logits by get_output_embeddings() or lm_head"
        )
    if call.probe is not None:
        refuse_other_logits(model, output, call.probe, logit_changes(model), _refuse)
        model.__dict__[PROBED] = True
    return call.result


def _replace(module: nn.Module, forward: Callable) -> None:
    """Give one module another forward.

    It is a method of that module, so that deep copies call their own. A class of its own would do
    that, too, but its name would be saved with the model.
    """
    slot = next(x for x in SLOTS if x in module.__dict__ or x == "forward")
    module.__dict__[OWN] = module.__dict__.get(slot), forward
    setattr(module, slot, MethodType(forward, module))


def _slot_of(module: nn.Module) -> str | None:
    """Return the attribute in which our forward of a module is now; None if it was wrapped."""
    own = module.__dict__
    return next((x for x in SLOTS if getattr(own.get(x), "__func__", None) is own[OWN][1]), None)


def _plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    before, _ = getattr(module, OWN)
    if before is not None:
        return before(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _refuse_another_product(layer: Any, hidden: Tensor) -> None:
    """Refuse a layer whose forward had been replaced by one that does more than its class's: the
    loss is not computed inside of that. One that only casts, as TRL's for an fp32 head, is fine."""
    before, _ = getattr(layer, OWN)
    if before is None or layer_parts(layer)[0] is not layer or not hidden.numel():
        return
    row = hidden.detach().flatten(0, -2)[:1]
    weight: Any = layer.weight
    with torch.no_grad():
        found = before(row)
        expected = nn.functional.linear(row.to(weight.dtype), weight, getattr(layer, "bias", None))
        off = (found.double() - expected.double()).abs().max()
        if not off <= 1e-2 * expected.abs().max():  # both may be rounded to 16 bits
            _refuse(
                f"the forward of the LM head has been replaced by {before}, which does not compute "
                "what the layer does; expected the layer's own: install before that, if it calls "
                "what it replaces, else undo it"
            )


def _refuse_shards_between(model: nn.Module, layer: nn.Module) -> None:
    """Refuse a module between model and head that FSDP2 gathers by what its forward returns: that
    is what stands in for logits, which has no gradient to bring the gathering about."""
    [name, *_] = [name for name, x in model.named_modules() if x is layer]
    parts = name.split(".")
    for end in range(1, len(parts)):
        between = ".".join(parts[:end])
        if hasattr(model.get_submodule(between), "unshard"):
            _refuse(
                f"the LM head is part of {between}, which was given to fully_shard by itself; "
                f"expected {between}'s layers, the head and the whole model there, without it"
            )


def _refuse_shards(layer: nn.Module) -> None:
    """Refuse a layer whose weights are in pieces even inside of its forward."""
    for name, weight in layer.named_parameters(recurse=False):
        zero3 = hasattr(weight, "ds_id") and weight.numel() == 0
        if zero3 or is_dtensor(weight):
            _refuse(
                f"the head's {name} is sharded inside of its forward, where its hooks should have "
                "gathered it; call model(**inputs, loss=...) on the outermost wrapper; a "
                "tensor-parallel head is not supported: leave lm_head out of the plan"
            )


def _refuse(message: str) -> NoReturn:
    raise KepoInputError(f"FusedHead: {message}")
