"""A process that trains tiny models and reports what it held, by phase. Started by a test.

Measured is resident memory (VmHWM, which is set back between phases through clear_refs) above what
was resident before the models were loaded. A whole run of smaller models goes first, so that code
and the libraries' own buffers are not counted; the allocator is told (see `ENVIRONMENT`) to give
every freed tensor back, so that none of it is.
"""

import ctypes
import gc
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import optimizer

from kepo.config import from_mapping
from kepo.loop import train
from kepo.models.vlm import VLM
from kepo.run import milestones
from kepo_kernels.compute import pages

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # see test_plan_memory
}


class Peaks:
    """Most that was resident in each phase."""

    def __init__(self):
        self.of = {}
        self.phase = "loading"
        self.base = 0

    def enter(self, phase):
        held = status("VmHWM") - self.base
        self.of[self.phase] = max(self.of.get(self.phase, 0), held)
        self.phase = phase
        forget_peak()


def status(key):
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def watched(peaks):
    """Phases by the calls with which they begin and end; what lies between them has no name."""
    generate, evaluate = VLM.generate, milestones.evaluate

    def watched_generate(self, *args, **settings):
        if peaks.phase == "evaluation":
            return generate(self, *args, **settings)
        peaks.enter("rollout")
        try:
            return generate(self, *args, **settings)
        finally:
            peaks.enter("update")

    def watched_evaluate(*args, **settings):
        peaks.enter("evaluation")
        try:
            return evaluate(*args, **settings)
        finally:
            peaks.enter("between")

    VLM.generate, milestones.evaluate = watched_generate, watched_evaluate
    hooks = [
        optimizer.register_optimizer_step_pre_hook(lambda *_: peaks.enter("optimiser")),
        optimizer.register_optimizer_step_post_hook(lambda *_: peaks.enter("between")),
    ]
    try:
        yield
    finally:
        VLM.generate, milestones.evaluate = generate, evaluate
        for hook in hooks:
            hook.remove()


def measure(warm_up, config):
    train(warm_up)
    peaks = Peaks()
    gc.collect()
    pages.release()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    peaks.base = status("VmRSS")
    with watched(peaks):
        train(config)
    peaks.enter("end")
    return peaks.of


if __name__ == "__main__":
    record = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    warm_up, config = (from_mapping(record[name], name) for name in ("warm_up", "config"))
    print("PEAKS " + json.dumps(measure(warm_up, config)))
