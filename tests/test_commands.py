"""The commands of README, each run once in small."""

import json
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


def test_bench_prints_its_table_and_writes_what_plot_draws(tmp_path):
    results, picture = tmp_path / "r.json", tmp_path / "p.png"
    settings = ["--shape", "64,16,24,512", "--repeats", "1", "--dtype", "float32"]
    out = run("benchmarks/bench_loss.py", *settings, "--json", results)
    rows = json.loads(results.read_text())
    for case in ("kd_open", "kd_half", "grpo", "joint"):
        mine = {row["provider"]: row for row in rows if row["case"] == case}
        assert {"floor", "ours", "eager"} <= set(mine)
        assert all(row["seconds"] > 0 and row["torch"] and row["commit"] for row in mine.values())
        assert mine["floor"]["x_floor"] == pytest.approx(1.0)
    assert "gated KD, half open / all open" in out
    run("benchmarks/plot.py", results, picture)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("module", ["kepo.train", "kepo.demo", "kepo_kernels"])
def test_help(module):
    out = run("-m", module, "--help")
    assert f"usage: python -m {module}" in out


@pytest.mark.parametrize("script", ["bench_loss.py", "plot.py"])
def test_help_of_scripts(script):
    assert "usage:" in run(f"benchmarks/{script}", "--help")
