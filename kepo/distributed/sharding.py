"""A model over several ranks: a whole copy on each (DDP), or a share on each (FSDP2).

Both do their part around a module's forward, and what we compute with a model is not one call of
it: it is generation, or backbone, teacher and loss at once. So the module they wrap is
`ForwardWrapper`, whose forward is whatever it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kepo.distributed.processes import is_rank0, rank, world_size
from kepo.errors import KepoConfigError
from kepo_kernels.versions import refuse_sharding_on_cpu

T = TypeVar("T")


class ForwardWrapper(nn.Module):
    """A model whose forward is any computation with it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def replicate(model: nn.Module) -> nn.Module:
    """Return the module through which a trained model averages its gradients over the ranks."""
    if world_size() == 1:
        return ForwardWrapper(model)
    # No buffer of these models changes, and a rollout must not wait for the others.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    without: dict[str, Any] = {name: False}
    return DistributedDataParallel(ForwardWrapper(model), gradient_as_bucket_view=True, **without)


def shard(
    model: Any,
    layers: Iterable[nn.Module],
    device: torch.device,
    compute: torch.dtype,
    *,
    offload: bool = False,
) -> nn.Module:
    """Leave this rank its share of every parameter, in rows; return the root of the groups.

    layers: the decoder layers and the blocks of the vision tower. Each is gathered by itself, in
    ``compute``, when it runs. Embedding, head and everything else are one group, gathered from a
    forward to the end of its backward, or from then on if there is none: a tied head is one
    parameter there, and an untied one can be read as a plain tensor. Gradients are averaged in
    float32. offload: shares stay in host memory. Raises KepoConfigError on CPUs where torch is too
    old for that.
    """
    if device.type == "cpu" and world_size() > 1 and (reason := refuse_sharding_on_cpu()):
        raise KepoConfigError(f"sharding: {reason}")
    mesh = init_device_mesh(device.type, (world_size(),))
    settings: dict[str, Any] = dict(
        mesh=mesh,
        # Inputs stay as the model made them: rotary angles are float32 on purpose.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if offload
        else OffloadPolicy(),
    )
    for layer in layers:
        fully_shard(layer, **settings)
    root = ForwardWrapper(model)
    fully_shard(root, reshard_after_forward=False, **settings)
    return root


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Gather a sharded model within the block; nothing in it waits for another rank then."""
    groups = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group is not root, recurse=False)
            group.reshard()


def own_gradients(root: nn.Module | None, last: bool) -> Any:
    """Return a context for the forward and backward of a micro-batch, in which gradients stay on
    their rank where that is possible.

    Copies (DDP) average their gradients after the last micro-batch only. Shares (FSDP2) exchange
    them after every one, or each rank would have to hold the gradients of all parameters.
    """
    if isinstance(root, DistributedDataParallel) and not last:
        return root.no_sync()
    return nullcontext()


# ---- shares and wholes ----


def fill(model: nn.Module, source: Mapping[str, Tensor] | None, device: torch.device) -> None:
    """Give every rank its part of rank 0's parameters and buffers, in place.

    source: on rank 0 all that ``model.named_parameters()`` and ``named_buffers()`` list, by name;
    None on the other ranks. One tensor at a time is unsharded on ``device``.
    """
    with torch.no_grad():
        for name, mine in [*model.named_parameters(), *model.named_buffers()]:
            if source is not None:
                full = source[name].to(device=device, dtype=mine.dtype)
            else:
                full = torch.empty(mine.shape, dtype=mine.dtype, device=device)
            if world_size() > 1:
                dist.broadcast(full, src=0)
            local = mine.to_local() if isinstance(mine, DTensor) else mine
            local.copy_(full[rows_of(mine)] if isinstance(mine, DTensor) else full)


def whole_state(model: nn.Module, only: str = "") -> dict[str, Tensor]:
    """Return the model's unsharded state dict, on the CPU, on rank 0. All ranks call.

    only: leave out every tensor that does not have this in its name.

    Names of one parameter share one tensor, as in an unsharded model.
    """
    seen: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if only not in name:
            continue
        if id(value) not in seen:
            full = whole_tensor(value.detach())
            seen[id(value)] = full.cpu() if is_rank0() else torch.empty(0)
        state[name] = seen[id(value)]
    return state if is_rank0() else {}


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a plain one. All ranks call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> slice:
    """Return the rows of a tensor's first dimension that lie on this rank; all if it is not
    sharded."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    rows = tensor.shape[0]
    each = -(-rows // world_size())  # as torch.chunk cuts: the last shares may be short or empty
    start, end = min(rank() * each, rows), min((rank() + 1) * each, rows)
    assert tensor.to_local().shape[0] == end - start, "FSDP2 shards by rows"
    return slice(start, end)


def share_like(tensor: Tensor, share: Tensor) -> Tensor:
    """Return this rank's rows as a tensor sharded like ``tensor``, unchanged if that is whole."""
    if not isinstance(tensor, DTensor):
        return share
    return DTensor.from_local(
        share.to(tensor.to_local().device),
        tensor.device_mesh,
        tensor.placements,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
