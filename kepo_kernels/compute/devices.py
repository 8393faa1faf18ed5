"""From the host to the device without waiting for it."""

import torch
from torch import Tensor

# A CUDA graph reads what it copied from the host again at each replay.
_captured: list[Tensor] = []


def moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`: itself if it is there; from the CPU to CUDA the host does not wait."""
    if x.device == device:
        return x
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    x = x.pin_memory()  # a copy: whatever the caller does next to its own, this one stays
    if torch.cuda.is_current_stream_capturing():
        _captured.append(x)
    return x.to(device, non_blocking=True)
