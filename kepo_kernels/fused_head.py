"""FusedHead: losses computed inside the forward of a model's LM head.

Whatever holds a model in pieces (FSDP2, ZeRO-3) gathers a layer's weight around that layer's own
forward, again before its backward, and then reduces its gradient. DDP does the latter for what its
forward has seen. So a loss that is computed *inside* these forwards gets the gradients of a single
process, and no weight has to be gathered by hand.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

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

Loss = Callable[[Tensor, Head], Any]
"""A function of the hidden states (B, T, H) and the head, whole. What it returns comes back from
the call: a loss, or tuples, lists and dicts of tensors (hooks find no tensor in other objects)."""

OWN = "_forwards_of_fused_head"
"""Attribute of a patched module: the forward that its instance had, or None, and ours."""


class FusedHead:
    """A model whose LM head computes losses in place of logits.

        FusedHead.install(model)            # before or after DDP, fully_shard, accelerate
        loss = model(**inputs, loss=lambda hidden, head: fused_grpo_loss(hidden, head, ids, ...))
        loss.backward()

    `model(**inputs, loss=function)` runs the backbone and calls `function(hidden, head)` inside the
    forward of the LM head, with the last hidden states (B, T, H) and the whole head as `head_of`
    reads it: softcap, scale, bias and PEFT's LoRA included. It returns what the function returns.
    Call the wrapper, not the model inside of it. Any loss of this package fits, and any number of
    them. `logits_to_keep` cuts the states as it cuts logits; `labels` belong into the function.

    `model.lm_head(hidden, loss=function)` is the same without the backbone, for a forward of your
    own: call it inside of that forward, so that the wrapper's hooks know of it.

    Calls without `loss` are untouched, generation among them, and so are the names of parameters,
    what is saved, and whether the head is tied. Deep copies take a loss, too; to pickle the model
    itself in place of its `state_dict()`, `remove` it first.

    DDP and FSDP2 average gradients over processes: to divide by a count of tokens, divide by the
    count over all of them and multiply by their number.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        """The model below all wrappers."""

    @classmethod
    def install(cls, model: nn.Module) -> "FusedHead":
        """Let a model and its LM head take `loss`; a second call changes nothing.

        `model` may be plain or wrapped by DDP, PEFT or `torch.compile`, or sharded by
        `fully_shard`. Install after PEFT has wrapped it.

        Raises KepoInputError for what `head_of` refuses, and for FSDP1.
        """
        output_layer(model)  # with the wrappers, among which it refuses FSDP1
        inner = innermost(model)
        _fused_layer(inner)
        if _backbone(inner) is not None and OWN not in inner.__dict__:
            _replace(inner, _model_forward(inspect.signature(inner.forward)))
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
            _, ours = getattr(module, OWN)
            if getattr(module.__dict__.get("forward"), "__func__", None) is not ours:
                raise KepoInputError(
                    f"FusedHead.remove: the forward of {type(module).__name__} has been replaced "
                    "since FusedHead.install; undo that first"
                )
        for module in patched:
            before, _ = module.__dict__.pop(OWN)
            del module.forward
            if before is not None:
                module.forward = before


# ---- forwards that take a loss ----


def _fused_layer(model: nn.Module) -> nn.Module:
    """Return the LM head of an unwrapped model, which takes `loss`.

    It is looked up at every call, as PEFT may have wrapped it since.
    """
    layer: Any = output_layer(model)
    # An entry of modules_to_save passes its arguments on to the copy of the active adapter.
    copies = hasattr(layer, "modules_to_save") and hasattr(layer, "original_module")
    each = [layer.original_module, *layer.modules_to_save.values()] if copies else [layer]
    if any(OWN not in x.__dict__ for x in each):
        for x in each:
            _open(x, logit_changes(model))
    return layer


def _open(layer: nn.Module, changes: tuple[float | None, float]) -> None:
    """Let a layer take `loss`, if it does not yet; `changes` are its model's softcap and factor."""
    if OWN in layer.__dict__:
        return
    layer_parts(layer)  # refuses now what it would refuse in every call

    def forward(self: nn.Module, *args: Any, loss: Loss | None = None, **kwargs: Any) -> Any:
        if loss is None:
            return _plain(self, *args, **kwargs)
        return _loss_inside(self, args[0], loss, changes)

    _replace(layer, forward)


def _loss_inside(
    layer: nn.Module, hidden: Tensor, loss: Loss, changes: tuple[float | None, float]
) -> Any:
    """Return `loss(hidden, head)`, within the forward of a layer that is the head."""
    base, factors = layer_parts(layer)
    parts = [base, *(x for a, b, _ in factors for x in (a, b))]

    def then(hidden: Tensor) -> Any:
        for part in parts:
            _refuse_shards(part)
        return loss(hidden, layer_head(layer, *changes))

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
    """Return a forward that runs the backbone and the head's loss, or without `loss` the model's
    own."""
    names = list(signature.parameters)

    def forward(self: nn.Module, *args: Any, loss: Loss | None = None, **kwargs: Any) -> Any:
        if loss is None:
            return _plain(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {name: x for name, x in given.items() if x is not None}
        if "labels" in given:
            raise KepoInputError(
                "FusedHead: labels are given beside loss, which takes the place of the model's own "
                "loss; expected one of them: take labels from the inputs into the function"
            )
        given.pop("num_items_in_batch", None)  # what the Trainer gives the model's own loss
        keep = given.pop("logits_to_keep", 0)
        hidden = _backbone(self)(**{"use_cache": False} | given)[0]
        hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return _fused_layer(self)(hidden, loss=loss)

    # What asks for the signature (the Trainer to choose columns, generate) is to find the model's.
    # functools.wraps would do that, too; but accelerate unwraps down to what is wrapped.
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = signature.replace(parameters=[this, *signature.parameters.values()])
    forward.__signature__ = own  # type: ignore[attr-defined]
    return forward


def _backbone(model: Any) -> Any:
    """Return the part of a model of transformers below its head; None if it is not one."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not model else None


def _replace(module: nn.Module, forward: Callable) -> None:
    """Give one module another forward.

    It is a method of that module, so that deep copies call their own. A class of its own would do
    that, too, but its name would be saved with the model.
    """
    module.__dict__[OWN] = module.__dict__.get("forward"), forward
    module.forward = MethodType(forward, module)


def _plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    before, _ = getattr(module, OWN)
    if before is not None:
        return before(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


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
