"""fuse_head: TRL's own losses, on log-probabilities and entropies of our kernels.

TRL 1.16 patches a model's forward so that `model(**inputs, labels=..., fused_lm_head=True)` returns
a `FusedCausalLMOutput`. Here that forward is replaced by one that computes the same inside the
forward of the LM head.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from kepo_kernels.errors import KepoInputError
from kepo_kernels.fused_head import FusedHead
from kepo_kernels.heads import Head, innermost
from kepo_kernels.linear import fused_linear_logprobs

OF_TRL = "_fused_forward"
"""Name of the function that `trl.trainer.utils.add_fused_lm_head` puts into a model."""

Numbers = Callable[[Tensor, Head], dict[str, Tensor]]
"""A function of the states (B, T, H) and the head that returns fields of the output, by name."""


def fuse_head(trainer: Any) -> Any:
    """Let a trainer of TRL get log-probabilities and entropies from our kernels; return it.

        trainer = fuse_head(GRPOTrainer(...))
        trainer.train()

    It fits every trainer that calls `add_fused_lm_head` and asks it for log-probabilities and
    entropies alone, as GRPOTrainer and RLOOTrainer do, and changes its model and its reference
    model. All losses, options and metrics stay TRL's own. A second call changes nothing.

    Raises KepoInputError for a trainer without TRL's fused head, for one whose head also computes
    other numbers, and for what `head_of` refuses.
    """
    models = [getattr(trainer, name, None) for name in ("model", "ref_model")]
    fused = [innermost(model) for model in models if isinstance(model, nn.Module)]
    if not fused:
        raise KepoInputError(
            f"trainer is {type(trainer).__name__} without a model; expected a trainer of TRL"
        )
    found = [(model, _settings(model, trainer)) for model in fused if not _is_ours(model)]
    for model, settings in found:
        FusedHead.install(model)
        _install(model, settings)
    return trainer


class _Settings(NamedTuple):
    """The arguments that TRL gave to `add_fused_lm_head`."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]


def _settings(model: nn.Module, trainer: Any) -> _Settings:
    """Read the arguments of TRL's fused head off the forward that it has put into the model."""
    forward = _newest(model)
    if forward is None:
        raise KepoInputError(
            f"trainer is {type(trainer).__name__}, and its {type(model).__name__} has no fused "
            "head of TRL's; expected a trainer that calls add_fused_lm_head, such as GRPOTrainer; "
            "for distillation use KepoDistillationTrainer"
        )
    given = inspect.getclosurevars(forward).nonlocals
    settings = _Settings(*(given[name] for name in _Settings._fields))
    others = sorted({*settings.outputs} - {"log_probs", "entropy"})
    if others:
        raise KepoInputError(
            f"trainer is {type(trainer).__name__}, whose head also computes {', '.join(others)}; "
            "expected one that asks for log_probs and entropy alone: leave TRL's own head in it"
        )
    return settings


OURS = "_forward_of_kepo"
"""Name of the function that `_install` puts into a model."""


def _newest(model: nn.Module) -> Any:
    """Return the last forward that TRL or `_install` has put into the model; None if none has.

    A later trainer on the same model puts TRL's around ours.
    """
    forward: Any = getattr(model.__dict__.get("forward"), "__func__", None)
    while forward is not None:
        if _code_name(forward) in (OF_TRL, OURS):
            return forward
        forward = getattr(forward, "__wrapped__", None)
    return None


def _is_ours(model: nn.Module) -> bool:
    return _code_name(_newest(model)) == OURS


def _code_name(function: Any) -> str:
    """Return the name that a function has in its source: functools.wraps changes the other."""
    return getattr(getattr(function, "__code__", None), "co_name", "")


def _install(model: nn.Module, settings: _Settings) -> None:
    """Put the fused forward into the model, around the one that it has, which answers all calls
    without `fused_lm_head`."""
    before: Any = model.forward

    def _forward_of_kepo(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        numbers: Numbers | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head:
            given = labels, shift_labels, num_items_in_batch
            return _output(self, settings, numbers, *given, *args, **kwargs)
        own = dict(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
        return before(*args, **{k: v for k, v in own.items() if v is not None}, **kwargs)

    # What asks for a signature (generate, to check its arguments) is to find the model's own.
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = inspect.signature(before)
    _forward_of_kepo.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[this, *own.parameters.values()]
    )
    model.forward = MethodType(_forward_of_kepo, model)


def _output(
    model: Any,
    settings: _Settings,
    numbers: Numbers | None,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    *args: Any,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Run the backbone, and the LM head as a function of what it is asked for.

    `numbers` stands in for log-probabilities and entropies: it runs inside the LM head's forward.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    states = model.base_model(*args, **kwargs | {"use_cache": False})
    hidden = states.last_hidden_state
    if shift_labels is None:
        if labels is None:
            raise KepoInputError(
                "fuse_head: labels is None; expected token ids, -100 where there is no loss"
            )
        targets, aligned = labels[:, 1:], slice(-1)
    else:
        targets, aligned = shift_labels, slice(None)
    mask = targets != -100

    def scored(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        device = head.weight.device  # with a device_map not always that of the last layer
        hidden = hidden.to(device)
        if numbers is not None:
            return numbers(hidden, head)
        return _scores(hidden[:, aligned], head, targets.to(device), settings)

    plain: Any = nullcontext()
    if settings.cast_lm_head_to_fp32:
        plain = torch.autocast(hidden.device.type, enabled=False)
    with plain:
        fields = FusedHead(model)(hidden, scored)
    log_probs = fields["log_probs"]
    if "loss" not in fields:
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        fields["loss"] = -log_probs.sum() / count
    if kwargs.get("output_router_logits"):
        fields["aux_loss"] = _balance(model, config, states, kwargs.get("attention_mask"))
        if numbers is None:
            weight = getattr(config, "router_aux_loss_coef", 0.0)
            fields["loss"] = fields["loss"] + weight * fields["aux_loss"]
    return FusedCausalLMOutput(**fields, label_mask=mask)


def _scores(hidden: Tensor, head: Head, targets: Tensor, settings: _Settings) -> dict[str, Tensor]:
    """Return log-probabilities and, if TRL has asked for them, entropies; 0 where the target is
    -100."""
    given = dict(completion_mask=targets != -100, temperature=settings.temperature)
    if "entropy" not in settings.outputs:
        return {"log_probs": fused_linear_logprobs(hidden, head, targets, **given)}
    both = fused_linear_logprobs(hidden, head, targets, return_entropy=True, **given)
    return dict(zip(("log_probs", "entropy"), both, strict=True))


def _balance(model: Any, config: Any, states: Any, attention_mask: Tensor | None) -> Tensor:
    """Return the load-balancing loss of a mixture of experts, which is Mixtral's in all of
    transformers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or model.num_experts
    chosen = config.num_experts_per_tok
    return load_balancing_loss_func(states.router_logits, experts, chosen, attention_mask)
