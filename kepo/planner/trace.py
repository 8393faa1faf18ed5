"""The memory of a piece of a model, found by running it on the meta device.

There every operation makes its outputs, with their lifetimes but without their bytes. Counting them
as they come and go gives what a real run would hold: whatever a layer keeps for backward, in the
installed version of transformers. Memory that an operation takes and frees again inside itself is
not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Traced:
    """The bytes that a call holds above its inputs and parameters."""

    kept: int
    """Bytes from the end of forward to the beginning of backward, the output included."""
    forward: int
    """The most bytes during forward."""
    backward: int = 0
    """The most bytes during backward, above ``kept``; work on parameters' gradients included."""

    def further(self, before: Traced, steps: float) -> Traced:
        """Extrapolate linearly: return the bytes ``steps`` steps beyond this trace, where one step
        leads from ``before`` to this trace."""
        pairs = zip(astuple(before), astuple(self), strict=True)
        return Traced(*(round(here + steps * (here - there)) for there, here in pairs))


class LiveBytes(TorchDispatchMode):
    """A mode that counts the bytes of storages made while it is on, as long as they live.

    ``now`` is the count, ``peak`` the largest that it has been.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self._note(tensor, counted=False)  # a tensor that was not made here is an input
        out = func(*args, **(kwargs or {}))
        for tensor in self._tensors(out):
            self._note(tensor, counted=True)
        return out

    def _tensors(self, tree: Any) -> Iterator[Tensor]:
        leaves = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
        return (x for x in leaves if x.device.type == self._device)

    def _note(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0

        def gone(key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.finalize(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def trace_inference(call: Callable[[], Any], device: str) -> Traced:
    """Trace a call without gradients; ``kept`` is its output and what it left in a cache."""
    with torch.no_grad(), attention_of(device), LiveBytes() as live:
        out = call()
        traced = Traced(live.now, live.peak)
    del out
    return traced


def trace_training(call: Callable[[], Tensor], parameters: Iterable[Any], device: str) -> Traced:
    """Trace a call and its backward; the parameters that want a gradient already have one, as from
    the second micro-batch on."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    with attention_of(device), LiveBytes() as live:
        out = call()
        kept, forward = live.now, live.peak
        upstream = torch.empty_like(out)
        live.peak = live.now
        out.backward(upstream)
        backward = live.peak - kept
    return Traced(kept, forward, backward)


@contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Make scaled_dot_product_attention keep on the meta device what it would keep on ``device``.

    The fused kernels keep queries, keys, values, output, one number per query and head, and a copy
    of the mask in the dtype of the queries. The plain kernel, which torch uses on the meta device,
    would keep the probabilities.
    """
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
        if device == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, is_causal, scale=scale
            )[0]
        grad = query.requires_grad
        mask = attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, grad, 0.0, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
