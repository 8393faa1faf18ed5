"""The commands of README, each run once in small."""

import re
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


def test_every_test_that_the_docs_name_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]*test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        folder = ROOT / "tests" / ("" if file.startswith(("kernels/", "../")) else "loop")
        path = folder / file.removeprefix("../")
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
