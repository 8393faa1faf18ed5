"""The sections that are commands of their own: a training step, NVIDIA's profiler and sanitizers.

And the little programs that the tools look at, which worker.py runs with `--once`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.clock import Skipped

BENCHMARKS = Path(__file__).resolve().parents[1]
WORKER = BENCHMARKS / "gpu" / "worker.py"
STATE = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.draw,"
STATE += "power.limit,temperature.gpu,clocks_event_reasons.active"
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
NOT_ALLOWED = "ERR_NVGPUCTRPERM"
# Each tensor an allocation of its own, so that its end is the end of what may be touched.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ENVIRONMENT = {"memcheck": ALONE, "racecheck": ALONE}


def command_of(name: str, dry_run: bool, stem: Path, limit: float) -> list[str]:
    """The command of a section; a dry run is without NVIDIA's tool in front of it."""
    device = "cpu" if dry_run else "cuda"
    if name == "step":
        script = BENCHMARKS / "loop" / "phases.py"
        if not script.is_file():
            raise FileNotFoundError(f"there is no {script.relative_to(BENCHMARKS.parent)}")
        seconds = 20 if dry_run else min(90, int(limit - 15))
        command = [sys.executable, str(script), "--device", device]
        return [*command, "--csv", f"{stem}_step.csv", "--seconds", str(seconds)]
    if name == "ncu":
        which = "regex:softmax_kernel|divergence_kernel|backward_kernel"
        options = ["--clock-control", "none", "--metrics", ",".join(METRICS)]
        options += ["--kernel-name", which, "--launch-count", "4"]
        tool, program = "ncu", "row_kernels_once"
    else:
        options = ["--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        tool, program = "compute-sanitizer", "losses_once"
    command = [sys.executable, str(WORKER), "--once", program, "--device", device]
    return command if dry_run else [found(tool), *options, *command]


def found(tool: str) -> str:
    """Its path, on PATH or where CUDA is usually installed."""
    places = [str(p) for p in Path("/usr/local").glob("cuda*/bin")]
    path = shutil.which(tool) or shutil.which(tool, path=":".join(places))
    if path is None:
        raise Skipped(f"{tool} is not on PATH")
    return path


def nvidia_smi(fields: str, otherwise: str = "not found") -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return otherwise
    return (done.stdout.strip().splitlines() or [otherwise])[0]


def losses_once(device: str) -> None:
    """Every loss with its gradients, small shapes: what the sanitizers look at."""
    import torch

    from benchmarks.gpu.oracle import LOSSES, make

    p = make(torch.device(device), (2, 4, 32, 48, 3001), torch.bfloat16)
    for loss in LOSSES.values():
        torch.autograd.grad(loss(p, True), p.leaves)
    print("each loss once, with its gradients: nothing was raised", flush=True)


def row_kernels_once(device: str) -> None:
    """The row kernels of a mixture, once each: what the profiler looks at."""
    import torch

    from kepo_kernels.compute import gemm
    from kepo_kernels.rows.contract import RowSettings
    from kepo_kernels.rows.dispatch import pick_rows

    rows, vocab = (512, 151936) if device == "cuda" else (8, 512)
    kernels, settings = pick_rows("auto", torch.device(device), torch.float32), RowSettings()
    logits, teacher = (torch.randn(rows, vocab, device=device) for _ in range(2))
    targets = torch.randint(vocab, (rows,), device=device)
    made = kernels.row_forward(logits, targets, teacher, settings)
    dtype = gemm.dlogits_dtype(torch.bfloat16, torch.float32, logits.device)
    out = torch.empty(rows, vocab, device=device, dtype=dtype)
    back = torch.randn(3, rows, device=device)
    kernels.row_backward_(logits, targets, teacher, made, back, settings, out)
    print(f"the row kernels once, {rows} x {vocab}: nothing was raised", float(out[0, 0]))
