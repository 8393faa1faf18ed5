"""Whether a model's own forward makes its logits as its head says: seen by running it.

Settings of a config can be read. What a forward does to the states on their way to the head, and to
the logits behind it, shows when the head's output is replaced by logits that are known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

RAMP = 50.0
"""Largest of the probe's logits: far enough for a softcap to bend them."""

Refuse = Callable[[str], NoReturn]


class LogitChanges(NamedTuple):
    """What a model does to its logits beyond its head's weight and bias."""

    softcap: float | None = None
    factor: float = 1.0
    """Factor of what the head returns, before the softcap."""
    before: float = 1.0
    """Factor of the states that the head is given."""


_seen: "WeakSet[nn.Module]" = WeakSet()
"""Models whose states and logits `refuse_another_head` has found to be those of their head."""


def probe_of(vocab: int, dims: int, device: torch.device) -> Tensor:
    """Return logits (..., 2, V) that a forward goes on with: zeros, which show whatever is added,
    and a ramp, which shows scale and softcap."""
    ramp = torch.linspace(-RAMP, RAMP, vocab, device=device)
    return torch.stack([torch.zeros_like(ramp), ramp]).view(*[1] * (dims - 2), 2, vocab)


def refuse_other_logits(
    model: nn.Module, output: Any, probe: Tensor, changes: LogitChanges, refuse: Refuse
) -> None:
    """Refuse a model whose forward has made of the probe other logits than `changes` do."""
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    of_transformers = hasattr(model, "config")
    if not isinstance(logits, Tensor) or (logits.shape != probe.shape and not of_transformers):
        return  # a forward of the caller's own, which returns something else
    expected = changes.factor * probe
    if changes.softcap is not None:
        expected = changes.softcap * torch.tanh(expected / changes.softcap)
    good = logits.shape == probe.shape
    if good:
        off = (logits.to(expected) - expected).abs()
        # Rounding to 16 bits on the way leaves zeros what they are.
        bounds = torch.stack([torch.tensor(1e-6), 1e-2 * expected.abs().max().cpu()])
        good = bool((off.reshape(2, -1).amax(-1).cpu() <= bounds).all())
    if not good:
        refuse(
            f"the forward of {type(model).__name__} does more to the logits of its LM head than a "
            "scale and a softcap (a bias of its own, a mask of tokens), which the losses would not "
            "know of; expected none of it: build the Head yourself, if one can say it"
        )


def refuse_another_head(
    model: Any,
    layer: nn.Module,
    weight: Tensor,
    changes: LogitChanges,
    refuse: Refuse,
) -> None:
    """Refuse an unwrapped model of transformers whose logits are not its head's of the backbone's
    last states.

    Runs two tokens, the first time that a model comes by. A model that is sharded or offloaded, or
    that cannot read two tokens alone, is not looked at.
    """
    if torch.compiler.is_compiling() or model in _seen or not _can_run(model):
        return
    states: dict[str, Any] = {}
    probe = probe_of(len(weight), 3, weight.device)

    def at_backbone(module: nn.Module, args: Any, output: Any) -> None:
        states["backbone"] = getattr(output, "last_hidden_state", None)

    def at_head(module: nn.Module, args: Any, output: Any) -> Tensor:
        states["head"] = args[0]
        return probe.clone()

    hooks = [layer.register_forward_hook(at_head)]
    if model.base_model is not model:
        hooks.append(model.base_model.register_forward_hook(at_backbone))
    output = None
    try:
        # One that reads pictures or sounds alone cannot run: then there is nothing to compare.
        with suppress(Exception), torch.no_grad(), _same_random_numbers(weight.device):
            output = model(**_two_tokens(model))
    finally:
        for hook in hooks:
            hook.remove()
    if output is None or "head" not in states:
        return
    of_backbone, arrived = states.get("backbone"), states["head"]
    if of_backbone is not None and not _same(changes.before * of_backbone, arrived):
        refuse(
            f"the forward of {type(model).__name__} changes the last states of its backbone before "
            "its LM head multiplies them, so that the head alone does not make the logits; compute "
            "the loss by FusedHead, which gets the states that arrive, or build the Head yourself"
        )
    refuse_other_logits(model, output, probe, changes, refuse)
    _seen.add(model)


def _same(states: Tensor, arrived: Tensor) -> bool:
    """Return whether states are the same but for rounding to another dtype; NaN is NaN, as a rank
    may have that waits for its weights."""
    if states.shape != arrived.shape:
        return False
    own, other = states.double().nan_to_num(), arrived.double().to(states.device).nan_to_num()
    return bool((other - own).abs().max() <= 1e-2 * own.abs().max())


def _can_run(model: Any) -> bool:
    """Return whether a forward of this module alone, without its wrapper, has all of its
    weights."""
    if not (hasattr(model, "config") and isinstance(getattr(model, "base_model", None), nn.Module)):
        return False  # none of transformers
    sharded = any(hasattr(module, "unshard") for module in model.modules())
    return not sharded and not any(
        x.device.type == "meta" or hasattr(x, "ds_id") or type(x).__name__ == "DTensor"
        for x in model.parameters()
    )


def _two_tokens(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave random numbers as they were: dropout draws some."""
    there = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(there, device_type=device.type if there else "cuda"):
        yield
