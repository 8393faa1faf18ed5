"""The commands of the pages: each has its help, and every flag that a page gives it."""

import contextlib
import functools
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").glob("*.md")]
COMMAND = re.compile(
    r"(?:\b(kepo (?:train|evaluate|plan|export|data check|demo))"
    r"|python (?:-m )?([\w./]*(?:compare|scans|\.py)))"
    r"((?: (?!#)\S+)*)"
)
"""In a line of a page: a command of ours, or else a script or module, and its arguments."""


def run(*words: object, cwd: Path = ROOT) -> str:
    command = [sys.executable, *map(str, words)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(program: str, *words: str) -> str:
    """What a command or a script prints, run as the main module of this process: Python does not
    start again, and torch is imported once."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
        patch.setattr(sys, "argv", [program, *words])
        patch.delitem(sys.modules, f"{program}.__main__", raising=False)
        with pytest.raises(SystemExit) as ended:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            raise SystemExit(0)  # a script need not
    assert not ended.value.code, out.getvalue()
    return out.getvalue()


@functools.cache
def help_of(program: str) -> str:
    module, *words = program.removeprefix("python -m ").split()
    return run_here(module, *words, "--help")


@pytest.mark.parametrize(
    "command",
    [
        *(
            "kepo train",
            "kepo evaluate",
            "kepo plan",
            "kepo export",
            "kepo data check",
            "kepo demo",
        ),
        *("python -m experiments.compare", "python -m experiments.scans"),
        "python -m kepo_kernels",
    ],
)
def test_help(command):
    assert f"usage: {command}" in help_of(command)


def test_the_command_lists_its_commands():
    out = run("-m", "kepo")
    assert out == run("-m", "kepo", "--help") and "usage: kepo {train," in out
    listed = re.findall(r"^  kepo (\w+)", out, re.M)
    assert listed == ["train", "evaluate", "plan", "export", "report", "data", "demo"]
    unknown = subprocess.run(
        [sys.executable, "-m", "kepo", "trian"], cwd=ROOT, capture_output=True, text=True
    )
    assert unknown.returncode == 2 and "no command 'trian'; did you mean train" in unknown.stderr


def flags_in(markdown: str) -> set[tuple[str, str]]:
    """Commands of fenced bash blocks, each with every flag it is given."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, re.M | re.S)
    found = [match for block in blocks for match in COMMAND.findall(block)]
    return {
        (ours or other, flag)
        for ours, other, arguments in found
        for flag in re.findall(r"--[a-z][\w-]*", arguments)
    }


def test_every_flag_in_the_pages_exists():
    given = set().union(*(flags_in(page.read_text(encoding="utf-8")) for page in PAGES))
    assert {("kepo train", "--train-data"), ("benchmarks/loop/phases.py", "--gate")} <= given
    unknown = [(one, flag) for one, flag in given if flag not in help_of(one).split()]
    assert [(one, flag) for one, flag in unknown if f"{flag}=" not in help_of(one)] == []


def test_an_unknown_flag_would_be_seen():
    page = "```bash\ntorchrun --nproc-per-node=8 -m kepo train a.yaml --lrr 2  # --not-this\n```\n"
    assert flags_in(page) == {("kepo train", "--lrr")}
    assert "--lrr" not in help_of("kepo train").split() and "--lr" in help_of("kepo train").split()


@pytest.mark.parametrize(
    "script",
    [
        *("bench_loss.py", "loop/phases.py", "loop/step.py", "losses/plot.py", "losses/compare.py"),
        *("gpu/suite.py", "gpu/worker.py"),
    ],
)
def test_help_of_benchmarks_from_anywhere(script, tmp_path):
    assert "usage:" in run(ROOT / "benchmarks" / script, "--help", cwd=tmp_path)


@pytest.mark.parametrize(
    "name", ["fetch_torch", "gpu_roofline", "installs", "matrix", "sass", "torches"]
)
def test_help_of_tools_from_anywhere(name, tmp_path):
    assert "usage:" in run(ROOT / "tools" / f"{name}.py", "--help", cwd=tmp_path)


def test_every_test_that_the_docs_name_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        [path] = (ROOT / "tests").rglob(file)
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)
