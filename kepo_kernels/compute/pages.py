"""Memory for the largest tensors of a call on a CPU: logits, and the gradient of the head.

Fresh from the system, in pages of 4 KiB that are zeroed one by one when they are first written,
such a tensor costs a tenth of the matrix product that fills it, and more on a virtual machine whose
host has to find the memory first. So `empty` and `zeros` ask Linux for pages of 2 MiB, and what is
freed is kept for the next call of the same sizes, up to KEPT_BYTES; `release` gives it back.
`untouched_zeros` is for a tensor of which only a few rows will ever be written: one too large to be
kept is fresh and small-paged, so that what is not written costs nothing; to fill kept pages with
zeros takes less time than to fault a few thousand in. On other devices and systems, and where Linux
has no such memory to give, these are torch.zeros and torch.empty: the error is torch's own.
"""

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

# Below this the allocator that torch uses has memory at hand that was written before.
LEAST_BYTES = 8 << 20
KEPT_BYTES = 512 << 20

_kept: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor that will be written completely before it is read."""
    if not _is_mapped(shape, dtype, device):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = _pages(_bytes(shape, dtype))
    if pages is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return _tensor(pages, shape, dtype, keep=True)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a zero tensor that will be written completely."""
    if not _is_mapped(shape, dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)
    return empty(shape, dtype, device).zero_()


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a zero tensor of which only a few rows will be written."""
    if _bytes(shape, dtype) <= KEPT_BYTES or not _is_mapped(shape, dtype, device):
        return zeros(shape, dtype, device)
    pages = _fresh(_bytes(shape, dtype))
    if pages is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return _tensor(pages, shape, dtype, keep=False)


def release() -> None:
    """Return the memory that is kept for the next call to the system."""
    _kept.clear()


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _is_mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    large = _bytes(shape, dtype) >= LEAST_BYTES
    return large and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def _pages(size: int) -> mmap.mmap | None:
    """Return kept pages of this size, or new ones; kept pages of another size are released first.

    None if the system has none.
    """
    for place, pages in enumerate(_kept):
        if len(pages) == size:
            with contextlib.suppress(IndexError):  # another thread was faster
                if len(taken := _kept.pop(place)) == size:
                    return taken
    release()
    fresh = _fresh(size)
    if fresh is not None:
        with contextlib.suppress(OSError):  # a kernel without pages of 2 MiB
            fresh.madvise(mmap.MADV_HUGEPAGE)
    return fresh


def _fresh(size: int) -> mmap.mmap | None:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        release()  # what is kept for the next call may be what this one lacks
        return None


def _tensor(pages: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype, keep: bool) -> Tensor:
    if not keep:
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    # The tensor's storage holds the view, the view its pages; with the last tensor the view goes.
    view = (ctypes.c_char * len(pages)).from_buffer(pages)
    weakref.finalize(view, _keep, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def _keep(pages: mmap.mmap) -> None:
    if sum(map(len, list(_kept))) + len(pages) <= KEPT_BYTES:
        _kept.append(pages)
