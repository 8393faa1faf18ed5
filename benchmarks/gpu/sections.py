"""The sections of the suite in their order: what is worth most on a first run comes first.

Device and ceilings, correctness in bf16, no waits of the host; then our own times at the first
shape, which all else is compared with; the probe; the other shapes; a whole training step; the
other checks; the peers; and tools that may take any time and are the least missed.

What may wreck the device's context or leave a process in doubt is in one of its own, "risky".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """`module.SECTIONS[name]` in a worker's process; without a module a command of commands.py."""

    name: str
    module: str = ""
    limit: float = 60.0  # seconds after which its process is killed
    needs: float = 10.0  # seconds that must be left for it to start
    process: str = "main"  # which process it is run in, with the sections around it of that name


TIMINGS, CHECKS, RUNTIME, PROBE, TRAIN = (
    f"benchmarks.gpu.{name}" for name in ("timings", "checks", "runtime", "probe", "train")
)
SECTIONS = (
    Section("facts", TIMINGS, limit=120, needs=5),
    Section("ceilings", TIMINGS, limit=30, needs=5),
    Section("correct_bf16", CHECKS, limit=120),
    Section("no_sync", RUNTIME, needs=5),
    Section("losses_first", TIMINGS, needs=5),
    Section("losses_more", TIMINGS, limit=90),
    Section("baseline", TIMINGS, limit=90, needs=30, process="baseline"),
    Section("host", PROBE),
    Section("probe", PROBE, limit=75, needs=20),
    Section("losses_llama-8b", TIMINGS),
    Section("losses_small", TIMINGS),
    Section("step", limit=150, needs=50),
    Section("train", TRAIN, limit=150, needs=20, process="train"),
    Section("fp16_range", CHECKS),
    Section("correct_fp16", CHECKS),
    Section("correct_fp32", CHECKS),
    Section("sampled_rows", CHECKS),
    Section("workspace", RUNTIME),
    Section("repeatable", RUNTIME),
    Section("two_streams", RUNTIME),
    Section("correct_softcap", CHECKS, limit=90),
    Section("chunks_beyond_int32", RUNTIME, needs=20, process="risky"),
    Section("one_chunk_beyond_int32", RUNTIME, process="risky"),
    Section("profile", PROBE, process="risky"),
    Section("cuda_graph", RUNTIME, process="risky"),
    Section("peers_eager", TIMINGS, needs=15, process="peers"),
    Section("peers_liger", TIMINGS, limit=90, process="peers"),
    Section("peers_others", TIMINGS, process="peers"),
    Section("compile", RUNTIME, limit=90, needs=30, process="compile"),
    Section("peers_compiled", TIMINGS, limit=90, needs=30, process="peers"),
    Section("ncu", limit=60, needs=25),
    Section("memcheck", limit=110, needs=120),
    Section("racecheck", limit=110, needs=120),
)
