"""Two processes, of which the second stands still, or ends, while the first waits for it; or both
are paused."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kepo.distributed.processes import all_gather, processes
from kepo.errors import KepoError

# Importing may take one much longer than the other, and is not what is tried here.
Path(f"{os.environ['MEET']}.{os.environ['RANK']}").touch()
while not all(Path(f"{os.environ['MEET']}.{rank}").exists() for rank in (0, 1)):
    time.sleep(0.01)
try:
    with processes("cpu", timeout=float(os.environ["TIMEOUT"])):
        all_gather("here")
        if os.environ["RANK"] == "1":
            if os.environ["HOW"] == "sleeps":
                time.sleep(1000)
            if os.environ["HOW"] == "killed":
                os.kill(os.getpid(), 9)
        if os.environ["HOW"] == "paused":
            print("here", flush=True)
            time.sleep(1)
        if os.environ["HOW"] == "killed":  # as where gradients are averaged
            dist.all_reduce(torch.ones(1))
        all_gather("there")
except KepoError as error:
    print(f"error: {error}")
    raise SystemExit(1) from error
