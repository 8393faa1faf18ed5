"""Checks for versions of Triton and torch that are too old, and what to do about them."""

import re

import torch

OLDEST_TRITON = (3, 4)  # that of torch 2.8; older ones lack features that the kernels use
OLDEST_TORCH_ON_ROCM = (2, 10)  # the first whose mm(out_dtype=) works there: pytorch#162600
OLDEST_TORCH_SHARDED_ON_CPU = (2, 9)  # in 2.8 gloo's reduce_scatter takes AVG and returns the sum


def release(words: str) -> tuple[int, ...]:
    """Parse a version: (3, 10, 0) of "3.10.0", "3.10.0+git1a2b" or "3.10.0rc1"; () if it does not
    start with a number."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", words)
    return tuple(map(int, found[1].split("."))) if found else ()


def triton_version() -> str | None:
    """Return the version of the Triton that can be imported here, or None if there is none."""
    try:
        import triton
    except ImportError:
        return None
    return getattr(triton, "__version__", "of an unknown version")


def refuse_triton() -> str | None:
    """Return why the installed Triton cannot be used, or None if it can; an unknown version can."""
    found = triton_version()
    if found is None or not release(found) or release(found) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return (
        f"triton {found} is too old: the kernels need triton >= {oldest}, "
        "which comes with torch >= 2.8 (pip install --upgrade torch)"
    )


def refuse_torch_on_rocm() -> str | None:
    """Return why this torch cannot do our matrix products on AMD GPUs; None if it can or is not for
    ROCm."""
    if not torch.version.hip or release(torch.__version__) >= OLDEST_TORCH_ON_ROCM:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH_ON_ROCM))
    return (
        f"torch {torch.__version__} is too old for ROCm: there mm(out_dtype=float32) of 16-bit "
        f"matrices needs torch >= {oldest} (pip install --upgrade torch, from ROCm's index)"
    )


def refuse_sharding_on_cpu() -> str | None:
    """Return why this torch cannot train a model sharded by `fully_shard` on CPUs, or None if it
    can."""
    if release(torch.__version__) >= OLDEST_TORCH_SHARDED_ON_CPU:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH_SHARDED_ON_CPU))
    return (
        f"torch {torch.__version__} adds up the gradients of fully_shard on CPUs (gloo) where it "
        f"should average them; there it needs torch >= {oldest} (pip install --upgrade torch), or "
        "DistributedDataParallel in its place"
    )
