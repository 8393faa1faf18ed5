"""Runs in several processes: recorded configs, one after another in the same processes.

torchrun ... tests/support/several.py configs.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from places import ROOT, SUPPORT


def torchrun(
    *arguments: object, processes: int = 2, standalone: bool = True, **settings: object
) -> subprocess.Popen:
    """A started `torchrun`; settings go to Popen."""
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, SUPPORT))),
        OMP_NUM_THREADS="1",
    )
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone"] if standalone else []
    command += [f"--nproc-per-node={processes}", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **settings)


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody has, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def bare(*arguments: object, processes: int = 2, **environment: str) -> list[subprocess.Popen]:
    """So many started processes of one group, without torchrun: each has its own exit code.

    arguments: of Python; a tuple has one for each process.
    """
    with free_port() as port:
        pass
    group = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    path = os.pathsep.join(map(str, (ROOT, SUPPORT)))
    started = []
    for rank in range(processes):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank), PYTHONPATH=path, OMP_NUM_THREADS="1")
        command = [sys.executable]
        command += [str(a[rank] if isinstance(a, tuple) else a) for a in arguments]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | group | own | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def run_all(configs: Sequence, record: Path, processes: int = 2) -> None:
    """Train by each config in turn, all in the same processes, and wait."""
    record.write_text(json.dumps([dataclasses.asdict(config) for config in configs]))
    done = torchrun(
        __file__, record, processes=processes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = done.communicate(timeout=280)
    assert done.returncode == 0, output[-6000:]


def main() -> None:
    from small import run_rigged

    from kepo.distributed.processes import processes

    with processes("cpu"):
        for settings in json.loads(Path(sys.argv[1]).read_text()):
            code = run_rigged(settings)
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()
