"""A process of a run that must not start: its own settings of each pair, and how that ended.

RANK=0 WORLD_SIZE=2 ... python tests/support/apart.py pairs.json OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from kepo.config import from_mapping
from kepo.distributed.processes import processes
from kepo.errors import KepoError
from kepo.loop import train


def main() -> None:
    rank = int(os.environ["RANK"])
    ends = []
    with processes("cpu"):
        for pair in json.loads(Path(sys.argv[1]).read_text()):
            started = time.perf_counter()
            try:
                end = f"exit code {train(from_mapping(pair[rank], 'pair')).exit_code}"
            except KepoError as error:
                end = str(error)
            ends.append([end, time.perf_counter() - started])
    Path(f"{sys.argv[2]}.{rank}").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
