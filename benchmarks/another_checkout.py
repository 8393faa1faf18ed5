"""The benchmarks of this checkout on the package of another one."""

from __future__ import annotations

import sys
from pathlib import Path


def import_kernels_of(tree: Path) -> None:
    """Imports kepo_kernels from `tree`: that package is meant by the name from then on.

    It must come before anything that imports kepo_kernels. `tree` does not stay on sys.path, or its
    benchmarks would be found as well.
    """
    sys.path.insert(0, str(tree))
    try:
        import kepo_kernels
    finally:
        sys.path.remove(str(tree))
    found = Path(kepo_kernels.__file__).resolve().parents[1]
    if found != tree.resolve():
        raise ImportError(f"kepo_kernels comes from {found}, not from {tree}")
