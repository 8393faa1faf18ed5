"""Memory for the largest tensors of a call on a CPU: logits, and the gradient of the head.

In pages of 4 KiB, each of which the system zeroes on its own when it is first written, such a
tensor costs a tenth of the matrix product that fills it. `zeros` and `empty` ask Linux for pages of
2 MiB. `untouched_zeros` does the opposite, for a tensor of which only a few rows will ever be
written: what is not written costs nothing. On other devices and systems these are torch.zeros and
torch.empty.
"""

import contextlib
import mmap

import torch
from torch import Tensor

# Below this the allocator that torch uses has memory at hand that was written before.
LEAST_BYTES = 8 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All of it will be written before it is read."""
    if _is_mapped(shape, dtype, device):
        return zeros(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All of it will be written."""
    return _mapped(shape, dtype, device, huge=True)


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Few of its rows will be written."""
    return _mapped(shape, dtype, device, huge=False)


def _is_mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    large = torch.Size(shape).numel() * dtype.itemsize >= LEAST_BYTES
    return large and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, huge: bool) -> Tensor:
    if not _is_mapped(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
