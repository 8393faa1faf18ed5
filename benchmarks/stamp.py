"""What every row of results is stamped with: machine, versions, commit, day."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = {
    "liger_kernel": "liger-kernel",
    "trl": "trl",
    "cut_cross_entropy": "cut-cross-entropy",
}


def stamp() -> dict[str, str | int]:
    """Machine, versions and commit, for every row of results."""
    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability())
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{column: installed(package) for column, package in PACKAGES.items()},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """KEPO_COMMIT, for a copy of the files without their history; else what git says."""
    if known := os.environ.get("KEPO_COMMIT"):
        return known
    try:
        here = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"
