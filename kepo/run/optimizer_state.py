"""The optimiser's moments on disk: one file, or one per rank where the optimiser is sharded.

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
from kepo.objective.optimizers import MOMENTS, AdamW8bit, Moment, local, widened

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
        f"{field}/{name}": local(value).contiguous()
        for name, parameter in named_parameters.items()
        for field, value in _fields(optimizer, parameter).items()
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
        if isinstance(optimizer, AdamW8bit):
            _load_8bit(folder, files, named_parameters, optimizer)
            return
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


def _fields(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """Return what is saved of a parameter, by field."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.saved(parameter)
    return optimizer.state[parameter]


def _load_8bit(
    folder: Path, files: list[Any], named_parameters: Parameters, optimizer: AdamW8bit
) -> None:
    """Put moments of 8 bits back: bit for bit if this rank has the rows of one file. The blocks of
    other rows are not those of the file, so they are rounded to 8 bits once more."""
    keys = set(files[0].keys())
    if not keys:
        return  # saved before the first step
    for name, parameter in named_parameters.items():
        if f"step/{name}" not in keys:
            raise KepoCheckpointError(
                f"{folder}: its optimizer does not know {name!r}; it belongs to another model"
            )
        as_saved = len(files) == (world_size() if isinstance(parameter, DTensor) else 1)
        moments = []
        for number in MOMENTS:
            parts = [_saved_moment(file, number, name) for file in files]
            shape = (sum(len(part.values) for part in parts), *parts[0].values.shape[1:])
            if shape != tuple(parameter.shape):
                raise KepoCheckpointError(
                    f"{folder}: state{number}/{name} has shape {list(shape)}, the model's is "
                    f"{list(parameter.shape)}; it belongs to another model"
                )
            if as_saved:
                moments.append(parts[rank() if len(files) > 1 else 0])
                continue
            whole = torch.cat([widened(part, number) for part in parts])
            moments.append(Moment(whole[rows_of(parameter)].contiguous(), None))
        optimizer.put_back(parameter, int(files[0].get_tensor(f"step/{name}")), moments)


def _saved_moment(file: Any, number: int, name: str) -> Moment:
    scales = f"absmax{number}/{name}"
    values = file.get_tensor(f"state{number}/{name}")
    return Moment(values, file.get_tensor(scales) if scales in file.keys() else None)  # noqa: SIM118


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
