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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.optim import optimizer

from kepo import loop
from kepo.config import from_mapping
from kepo.loop import train
from kepo.models.vlm import VLM
from kepo.rollout import explore, hints
from kepo.run import milestones
from kepo.tasks.multiple_choice import MultipleChoice
from kepo_kernels.compute import pages

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # see test_plan_memory
}

WATCHED = (
    (VLM, "generate", "rollout"),
    (explore, "rescue", "hints"),
    (loop, "score", "scoring"),
    (loop, "add_gradients", "update"),
    (milestones, "greedy_scores", "evaluation"),
)
"""The calls that are phases: where they are, their names, and the phases'."""
NAMED = {phase for *_, phase in WATCHED}


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

    def within(phase, call):
        """The call, as this phase unless it is a part of another."""

        def watched_call(*args, **settings):
            if peaks.phase in NAMED:
                return call(*args, **settings)
            peaks.enter(phase)
            try:
                return call(*args, **settings)
            finally:
                peaks.enter("between")

        return watched_call

    def stepping(*_):
        peaks.enter("optimiser")

    def stepped(*_):
        peaks.enter("between")

    hooks = [
        optimizer.register_optimizer_step_pre_hook(stepping),
        optimizer.register_optimizer_step_post_hook(stepped),
    ]
    with ExitStack() as stack:
        for place, name, phase in WATCHED:
            call = within(phase, getattr(place, name))
            stack.enter_context(patch.object(place, name, call))
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def worst(config):
    """No completion ends by itself, and the teacher's hints are as long as they may be: a digit is
    a token."""
    longest = min(hints.MAX_HINT_LENGTH, config.max_completion_length)
    never = VLM.never_sampled
    ends_too = lambda self: sorted({*never(self), *self.encoder.end_ids})  # noqa: E731
    with (
        patch.object(VLM, "never_sampled", ends_too),
        patch.object(MultipleChoice, "hint_of", lambda task, text: "7" * longest),
        patch.object(hints, "usable", lambda hint, *_: True),
    ):
        yield


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
    with worst(config):
        print("PEAKS " + json.dumps(measure(warm_up, config)))
