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
    """`module.SECTIONS[name]` in a worker's process; without a module a command of gpu_tools.py."""

    name: str
    module: str = ""
    limit: float = 60.0  # seconds after which its process is killed
    needs: float = 10.0  # seconds that must be left for it to start
    process: str = "main"  # which process it is run in, with the sections around it of that name


SECTIONS = (
    Section("facts", "gpu_timings", limit=120, needs=5),
    Section("ceilings", "gpu_timings", limit=30, needs=5),
    Section("correct_bf16", "gpu_checks", limit=120),
    Section("no_sync", "gpu_runtime", needs=5),
    Section("losses_first", "gpu_timings", needs=5),
    Section("losses_more", "gpu_timings", limit=90),
    Section("baseline", "gpu_timings", limit=90, needs=30, process="baseline"),
    Section("host", "gpu_probe"),
    Section("probe", "gpu_probe", limit=75, needs=20),
    Section("losses_llama-8b", "gpu_timings"),
    Section("losses_small", "gpu_timings"),
    Section("step", limit=150, needs=50),
    Section("fp16_range", "gpu_checks"),
    Section("correct_fp16", "gpu_checks"),
    Section("correct_fp32", "gpu_checks"),
    Section("sampled_rows", "gpu_checks"),
    Section("workspace", "gpu_runtime"),
    Section("repeatable", "gpu_runtime"),
    Section("two_streams", "gpu_runtime"),
    Section("correct_softcap", "gpu_checks", limit=90),
    Section("chunks_beyond_int32", "gpu_runtime", needs=20, process="risky"),
    Section("one_chunk_beyond_int32", "gpu_runtime", process="risky"),
    Section("profile", "gpu_probe", process="risky"),
    Section("cuda_graph", "gpu_runtime", process="risky"),
    Section("peers_eager", "gpu_timings", needs=15, process="peers"),
    Section("peers_liger", "gpu_timings", limit=90, process="peers"),
    Section("peers_others", "gpu_timings", process="peers"),
    Section("compile", "gpu_runtime", limit=90, needs=30, process="compile"),
    Section("peers_compiled", "gpu_timings", limit=90, needs=30, process="peers"),
    Section("ncu", limit=60, needs=25),
    Section("memcheck", limit=110, needs=120),
    Section("racecheck", limit=110, needs=120),
)
