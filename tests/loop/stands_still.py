"""Two processes, of which the second stands still, or ends, while the first waits for it."""

import os
import time

import torch
import torch.distributed as dist

from kepo.errors import KepoError
from kepo.parallel import processes, together

try:
    with processes("cpu", patience=float(os.environ["PATIENCE"])):
        together("here")
        if os.environ["RANK"] == "1":
            if os.environ["HOW"] == "sleeps":
                time.sleep(1000)
            os.kill(os.getpid(), 9)
        if os.environ["HOW"] == "killed, tensors":  # as where gradients are averaged
            dist.all_reduce(torch.ones(1))
        together("there")
except KepoError as error:
    print(f"error: {error}")
    raise SystemExit(1) from error
