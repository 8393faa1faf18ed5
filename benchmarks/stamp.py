"""What every row of results is stamped with: machine, versions, commit, day."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
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


def commit(root: Path = ROOT) -> str:
    """KEPO_COMMIT, for a copy of the files without their history; else what git says.

    It ends in -dirty where a tracked file was changed, but for those in benchmarks/results: a
    command that writes its results there measures the code of that commit all the same.
    """
    if known := os.environ.get("KEPO_COMMIT"):
        return known
    try:
        name = _git(root, "describe", "--always", "--abbrev=12")
        status = ("status", "--porcelain", "--untracked-files=no")
        changed = _git(root, *status, "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"
