"""The choice of back-end for the rows: the only place that makes it, and that imports one."""

from importlib import import_module
from types import ModuleType

import torch

from kepo_kernels.errors import KepoInputError
from kepo_kernels.versions import refuse_torch_on_rocm

IMPLS = ("triton", "cpu", "torch")


def unavailable(impl: str) -> str | None:
    """Return why this back-end cannot run here at all, or None if it can."""
    return None if impl == "torch" else _module(impl).unavailable()


def pick_rows(impl: str, device: torch.device, logits_dtype: torch.dtype) -> ModuleType:
    """Return the `*_rows` module for these logits.

    "auto" takes the fused back-end of the device (Triton on CUDA, C++ on CPU) when it is available
    and reads this dtype, and PyTorch otherwise. A back-end requested by name is used or refused,
    never replaced. 16-bit matrices are refused on ROCm if torch cannot multiply them.
    """
    if device.type == "cuda" and logits_dtype != torch.float64:
        reason = refuse_torch_on_rocm()
        if reason is not None:
            raise KepoInputError(f"impl={impl!r} cannot be used here: {reason}")
    fused = "cpu" if device.type == "cpu" else "triton"
    if impl == "auto":
        usable = logits_dtype != torch.float64 and unavailable(fused) is None
        return _module(fused if usable else "torch")
    reason = unavailable(impl)
    if reason is None and impl != "torch" and logits_dtype == torch.float64:
        reason = "it has no float64 kernels"
    if reason is None and not _takes(impl, device):
        reason = f"the tensors are on {device}"
    if reason is not None:
        raise KepoInputError(
            f"impl={impl!r} cannot be used here: {reason}; use impl='auto' or impl='torch'"
        )
    return _module(impl)


def _takes(impl: str, device: torch.device) -> bool:
    """Return whether the back-end works on tensors of this device; Triton's interpreter works on
    CPU tensors."""
    if impl == "triton":
        return device.type == "cuda" or _module(impl).INTERPRETED
    return impl == "torch" or device.type == "cpu"


def _module(impl: str) -> ModuleType:
    return import_module(f"kepo_kernels.rows.{impl}_rows")
