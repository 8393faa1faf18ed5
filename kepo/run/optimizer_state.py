"""AdamW's moments on disk: one file, or one per rank where the optimiser is sharded.

A file holds the rows of every parameter that its rank has, so the files in order of rank make up
the whole, and a run with another number of ranks can take its own rows from them.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kepo.distributed.processes import is_rank0, rank, world_size
from kepo.distributed.sharding import rows_of, share_like
from kepo.errors import KepoCheckpointError

Parameters = dict[str, torch.nn.Parameter]


def save_optimizer(
    folder: Path, named_parameters: Parameters, optimizer: torch.optim.Optimizer
) -> list[Path]:
    """Write this rank's part of the optimiser; return the files written, none if another rank
    writes the same."""
    sharded = any(isinstance(p, DTensor) for p in named_parameters.values())
    if not sharded and not is_rank0():
        return []
    path = folder / "optimizer.safetensors"
    if sharded and world_size() > 1:
        path = folder / f"optimizer-{rank() + 1:05d}-of-{world_size():05d}.safetensors"
    tensors = {
        f"{field}/{name}": _local(value).contiguous()
        for name, parameter in named_parameters.items()
        for field, value in optimizer.state[parameter].items()
    }
    save_file(tensors, path)
    return [path]


def load_optimizer(
    folder: Path, named_parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Put the saved moments back by parameter name, however many ranks saved them.

    Raises KepoCheckpointError if they belong to another model.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(folder.glob("optimizer*.safetensors"))
        ]
        if not files:
            raise KepoCheckpointError(f"{folder} has no optimizer*.safetensors")
        for key in files[0].keys():  # noqa: SIM118 - a safetensors file is no mapping
            field, _, name = key.partition("/")
            if name not in named_parameters:
                raise KepoCheckpointError(
                    f"{folder}: its optimizer knows {name!r}, which the model lacks; it belongs to "
                    "another model"
                )
            parameter = named_parameters[name]
            if field == "step":
                value = files[0].get_tensor(key)
            else:
                pieces = [file.get_slice(key) for file in files]
                shape = [sum(p.get_shape()[0] for p in pieces), *pieces[0].get_shape()[1:]]
                if shape != list(parameter.shape):
                    raise KepoCheckpointError(
                        f"{folder}: {key} has shape {shape}, the model's is "
                        f"{list(parameter.shape)}; it belongs to another model"
                    )
                mine = _rows(pieces, range(shape[0])[rows_of(parameter)])
                value = share_like(parameter, mine.to(parameter.device))
            optimizer.state[parameter][field] = value


def _rows(pieces: list[Any], wanted: range) -> Tensor:
    """Return the wanted rows of a tensor whose rows are spread over files; no others are read."""
    parts, before = [], 0
    for piece in pieces:
        rows = piece.get_shape()[0]
        start, stop = max(wanted.start - before, 0), min(wanted.stop - before, rows)
        if start < stop:
            parts.append(piece[start:stop])
        before += rows
    return torch.cat(parts) if parts else pieces[0][0:0]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
