"""The commands of README, each run once in small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        *("kepo.train", "kepo.plan", "kepo.demo", "kepo.compare", "kepo.evaluate"),
        "kepo.data check",
        "kepo_kernels",
    ],
)
def test_help(command):
    out = run("-m", *command.split(), "--help")
    assert f"usage: python -m {command}" in out


@pytest.mark.parametrize("script", ["bench_loss.py", "loop/step.py", "plot.py", "compare.py"])
def test_help_of_scripts(script):
    assert "usage:" in run(f"benchmarks/{script}", "--help")
