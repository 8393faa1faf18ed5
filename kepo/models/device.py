"""The devices that models run on, by the names that torch has for them."""

from __future__ import annotations

import torch

from kepo.errors import KepoConfigError


def known_device(name: str | torch.device) -> torch.device:
    """Return the device of a setting ``device``: cpu, cuda, cuda:<number>, or auto, which is cuda
    where torch sees a CUDA device, else cpu.

    Raises KepoConfigError for another, and for a CUDA device that is not here. (torch knows many
    kinds more, mps and meta among them; the losses have no rows for those.)
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        kind = device.type
    except (RuntimeError, TypeError):
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise KepoConfigError(f"device={str(name)!r}; expected auto, cpu, cuda or cuda:<number>")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise KepoConfigError(
                f"device={str(name)!r}, but torch {torch.__version__} sees no CUDA device here"
            )
        if device.index is not None and device.index >= count:
            raise KepoConfigError(
                f"device={str(name)!r}, but this process sees {count} CUDA devices; expected a "
                f"number below {count}"
            )
    return device
