"""Copies from the host to the device that do not make the host wait."""

import torch
from torch import Tensor

# A CUDA graph reads what it copied from the host again at each replay.
_captured: list[Tensor] = []


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`, without a copy if it is there already; from the CPU to CUDA the host
    does not wait."""
    if x.device == device:
        return x
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    x = x.pin_memory()  # a copy: whatever the caller does next to its own, this one stays
    if torch.cuda.is_current_stream_capturing():
        _captured.append(x)
    return x.to(device, non_blocking=True)
