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
        *("kepo train", "kepo evaluate", "kepo plan", "kepo data check", "kepo demo"),
        *("python -m experiments.compare", "python -m kepo_kernels"),
    ],
)
def test_help(command):
    out = run("-m", *command.removeprefix("python -m ").split(), "--help")
    assert f"usage: {command}" in out


def test_the_command_lists_its_commands():
    out = run("-m", "kepo")
    assert out == run("-m", "kepo", "--help") and "usage: kepo {train," in out
    listed = re.findall(r"^  kepo (\w+)", out, re.M)
    assert listed == ["train", "evaluate", "plan", "data", "demo"]
    unknown = subprocess.run(
        [sys.executable, "-m", "kepo", "trian"], cwd=ROOT, capture_output=True, text=True
    )
    assert unknown.returncode == 2 and "no command 'trian'" in unknown.stderr


@pytest.mark.parametrize("script", ["bench_loss.py", "loop/step.py", "plot.py", "compare.py"])
def test_help_of_scripts(script):
    assert "usage:" in run(f"benchmarks/{script}", "--help")


def test_every_test_that_the_docs_name_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        [path] = (ROOT / "tests").rglob(file)
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
