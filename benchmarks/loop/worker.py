"""One process of step.py: takes the steps of a variant, or of a part of it, as it is told to.

python benchmarks/loop/worker.py FOLDER VARIANT PART
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.loop.on_disk import read_sizes
from benchmarks.loop.variants import VARIANTS

if __name__ == "__main__":
    folder, name, part = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    sizes = read_sizes(folder)
    VARIANTS[name].parts(sizes)[part](folder, f"{name}.{part}", sizes)
