"""The header of a safetensors file, and checks that its tensors can be the weights of a model.

Nothing here knows the model: a file is judged by its header and its bytes, before it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kepo.errors import KepoCheckpointError

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of weights that are not quantized, as safetensors and torch call them."""
_PIECE = 2**16  # bytes; in nearly every tensor the first piece has something in it

Header = dict[str, dict[str, Any]]
"""The ``dtype``, ``shape`` and ``data_offsets`` of each tensor, by its name; the offsets are the
bytes from and to, counted after the header."""


def header(file: Path) -> Header:
    """Read the header of a safetensors file; KepoCheckpointError if it is no such file, or cut."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            tensors = json.loads(opened.read(size))
    except (OSError, ValueError, SafetensorError) as error:
        raise KepoCheckpointError(
            f"{file} cannot be read: {error}; expected whole safetensors: copy it again"
        ) from error
    tensors.pop("__metadata__", None)
    return tensors


def check_weights(file: Path, tensors: Header) -> None:
    """Raise KepoCheckpointError for tensors of no float dtype, which would be cast in silence, and
    for what an interrupted copy leaves: neighbouring tensors that are all zeros.

    One weight that is all zeros may be meant so, as may biases and the second matrices of adapters
    that have not learnt yet. Two that lie next to each other in the file are not.
    """
    other = sorted(name for name, tensor in tensors.items() if tensor["dtype"] not in FLOATS)
    if other:
        raise KepoCheckpointError(
            f"{file} has {len(other)} tensors of other dtypes than {', '.join(FLOATS.values())}, "
            f"first {other[0]}: {tensors[other[0]]['dtype']}; expected weights that are not "
            "quantized, or quantization_config in config.json"
        )
    blank = _blank_neighbours(file, tensors)
    if len(blank) > 1:
        raise KepoCheckpointError(
            f"{file} holds nothing but zeros in {len(blank)} neighbouring weights, {blank[0]} to "
            f"{blank[-1]}, as after a copy that stopped; copy it again"
        )


def _blank_neighbours(file: Path, tensors: Header) -> list[str]:
    """Return the first two or more all-zero weights with no other between them in the file, or
    []."""
    filled = {name: x["data_offsets"] for name, x in tensors.items() if 0 not in x["shape"]}
    blank: list[str] = []
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        for name, (begin, end) in sorted(filled.items(), key=lambda item: item[1]):
            if not _all_zero(opened, start + begin, end - begin):
                if len(blank) > 1:
                    break
                blank = []
            elif not _may_be_zero(name):
                blank.append(name)
    return blank if len(blank) > 1 else []


def _may_be_zero(name: str) -> bool:
    return name.endswith("bias") or "lora_B" in name


def _all_zero(opened: Any, start: int, length: int) -> bool:
    opened.seek(start)
    while length > 0 and (piece := opened.read(min(_PIECE, length))):
        if piece.count(0) != len(piece):
            return False
        length -= len(piece)
    return True
