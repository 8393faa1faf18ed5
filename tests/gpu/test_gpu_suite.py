"""The suite for the GPU, run on the CPU: it reaches its end whatever happens."""

import csv
import importlib
import shutil
import sys
import zipfile

import pytest
import torch
from places import ROOT

from benchmarks.gpu import commands, suite, timings
from benchmarks.gpu.clock import Clock, Skipped
from benchmarks.gpu.sections import SECTIONS, Section

PLANTED = """
import os, sys, time

def facts(clock):
    yield {"environment": {"machine": "planted", "triton": "3.6.0"}}

def good(clock):
    yield {"case": "kd", "provider": "ours", "seconds": 1.0}

def wrong(clock):
    yield {"case": "half", "provider": "ours", "seconds": 2.0}
    raise AssertionError("kd, dhidden: error 2 exceeds 1\\nand so on")

def dead(clock):
    import torch
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
    synchronize()

def crashes(clock):
    os.abort()

def hangs(clock):
    time.sleep(600)

def peer(clock):
    import toy_peer
    return f"{toy_peer.NAME}, process {os.getpid()}"

def slow(clock):
    time.sleep(1)
    return f"{clock.left():.0f} s left"

SECTIONS = {name: value for name, value in globals().items() if callable(value)}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Runs the suite with sections of the module above; (exit status, verdicts, rows, log)."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))

    def run(*sections, arguments=()):
        out = tmp_path / "out"
        known = [Section("facts", "planted", needs=0)]
        known += [s if isinstance(s, Section) else Section(s, "planted", needs=0) for s in sections]
        status = suite.main(["--dry-run", "--out", str(out), *arguments], tuple(known))
        return status, *results(out)

    return run


def results(out):
    """Verdicts by section, in order; rows; the log. There are no other files but these two."""
    table, log = sorted(out.iterdir(), key=lambda path: path.suffix)
    words = log.read_text()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [line.split(maxsplit=2) for line in words.splitlines()]
    verdicts = {
        line[1]: f"{line[0]} {line[2]}"
        for line in lines
        if len(line) == 3 and line[0] in ("PASS", "FAIL", "SKIP", "LATE") and line[1][-1] != ":"
    }
    return verdicts, rows, words


def test_each_disaster_costs_its_own_section_only(planted, tmp_path, capsys):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "toy_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_peer.py", "NAME = 'a peer'")
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no archive")
    hangs = Section("hangs", "planted", limit=1.0, needs=0)
    alone = Section("peer", "planted", needs=0, process="risky")
    names = ("good", "wrong", "dead", hangs, "crashes", alone, Section("nowhere", "absent"), "slow")
    status, verdicts, rows, log = planted(*names, arguments=["--wheels", str(wheels)])

    assert status == 1
    assert list(verdicts) == ["facts", *(getattr(name, "name", name) for name in names)]
    assert verdicts["good"].startswith("PASS 1 rows")
    assert verdicts["wrong"].startswith("FAIL AssertionError: kd, dhidden: error 2 exceeds 1 (")
    illegal = "CUDA error: an illegal memory access was encountered"
    assert f"FAIL RuntimeError: {illegal}; the context is dead: {illegal}" in verdicts["dead"]
    assert verdicts["hangs"].startswith("FAIL killed after 1 s")
    assert verdicts["crashes"].startswith("FAIL its process was ended by SIGABRT")
    assert verdicts["peer"].startswith("PASS a peer, process")
    assert verdicts["nowhere"].startswith("FAIL ModuleNotFoundError: No module named 'absent'")
    assert verdicts["slow"].startswith("PASS")
    assert [(row["machine"], row["case"], row["seconds"]) for row in rows] == [
        ("planted", "kd", "1"),
        ("planted", "half", "2"),
    ]
    assert log.splitlines()[-1] == "4 sections passed, 5 failed, 0 skipped, 0 left out"
    screen = capsys.readouterr().out
    assert log.count("Traceback") == 3 and "Traceback" not in screen
    assert "broken-1.0-py3-none-any.whl cannot be unpacked" in screen


def test_the_clock_ends_it(planted):
    """A section that hangs is killed in time, and what does not fit is named."""
    more = Section("good", "planted", needs=5)
    arguments = ["--seconds", str(suite.SPARE + 2.5)]
    status, verdicts, rows, log = planted("slow", "hangs", more, arguments=arguments)
    assert status == 1 and rows == []
    assert verdicts["slow"].startswith("PASS") and "FAIL killed after" in verdicts["hangs"]
    assert verdicts["good"].startswith("LATE left out: the time is over")
    assert "2 sections passed, 1 failed, 0 skipped, 1 left out" in log
    taken = float(log.rpartition("and .log, ")[2].split()[0])
    assert taken <= suite.SPARE + 2.5


def test_when_no_process_starts_it_ends(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "WORKER", tmp_path / "absent.py")
    status, verdicts, _, log = planted("good", "slow", "peer")
    assert status == 1 and "can't open file" in log
    found = [words.rpartition(" (")[0] for words in verdicts.values()]
    assert (
        found == ["FAIL its process ended with exit status 2"] * 2 + ["FAIL no process starts"] * 2
    )


def test_commands_are_sections_too(planted, monkeypatch):
    def command_of(name, dry_run, stem, limit):
        if name == "step":
            raise FileNotFoundError("there is no benchmarks/loop/phases.py")
        if name == "racecheck":
            raise Skipped("compute-sanitizer is not on PATH")
        said = {"memcheck": "print('0 errors')", "ncu": "exit('ERR_NVGPUCTRPERM: the user ...')"}
        said |= {"fails": "exit('2 errors')", "sleeps": "import time; time.sleep(600)"}
        return [sys.executable, "-c", said[name]]

    monkeypatch.setattr(commands, "command_of", command_of)
    names = ("step", "racecheck", "memcheck", "ncu", "fails")
    late = Section("sleeps", limit=0.5, needs=0)
    status, verdicts, _, log = planted(*(Section(n, needs=0) for n in names), late)
    assert status == 1 and "2 errors" in log
    found = [words.rpartition(" (")[0] for words in verdicts.values()][1:]
    assert found == [
        "FAIL FileNotFoundError: there is no benchmarks/loop/phases.py",
        "SKIP skipped: compute-sanitizer is not on PATH",
        "PASS 0 errors",
        "SKIP skipped: the counters of the device may not be read here",
        "FAIL ended with exit status 1: 2 errors",
        "LATE killed after 0 s: it printed nothing",
    ]


def test_commands_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(commands.shutil, "which", lambda tool, path=None: f"/cuda/bin/{tool}")
    monkeypatch.setattr(commands, "BENCHMARKS", tmp_path)
    stem = tmp_path / "h100"
    with pytest.raises(FileNotFoundError, match=r"loop/phases.py"):
        commands.command_of("step", False, stem, 150)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "phases.py").touch()
    step = commands.command_of("step", False, stem, 150)
    assert step[2:] == ["--device", "cuda", "--csv", f"{stem}_step.csv", "--seconds", "90"]
    assert commands.command_of("step", False, stem, 60)[-1] == "45"
    assert commands.command_of("step", True, stem, 60)[2:4] == ["--device", "cpu"]
    ncu, check = (commands.command_of(n, False, stem, 60) for n in ("ncu", "memcheck"))
    assert ncu[:3] == ["/cuda/bin/ncu", "--clock-control", "none"]
    assert check[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    for command in (ncu, check):
        assert callable(getattr(commands, command[command.index("--once") + 1]))
    monkeypatch.setattr(commands.shutil, "which", lambda tool, path=None: None)
    with pytest.raises(Skipped, match="ncu is not on PATH"):
        commands.command_of("ncu", False, stem, 60)


def test_sections_are_all_there_and_in_order():
    names = [section.name for section in SECTIONS]
    assert len(set(names)) == len(names)
    modules = {section.module for section in SECTIONS} - {""}
    known = {name for module in modules for name in importlib.import_module(module).SECTIONS}
    assert known == {section.name for section in SECTIONS if section.module}
    order = ("facts", "ceilings", "correct_bf16", "no_sync", "losses_first", "losses_more", "probe")
    order += ("losses_llama-8b", "losses_small", "step", "correct_fp32", "peers_eager", "ncu")
    assert [name for name in names if name in (*order, "memcheck")] == [*order, "memcheck"]
    assert all(s.process == "risky" for s in SECTIONS if "int32" in s.name or "graph" in s.name)
    assert names[-2:] == ["memcheck", "racecheck"]
    assert all(section.needs >= 120 for section in SECTIONS[-2:])


@pytest.mark.slow
def test_dry_run_visits_every_section(tmp_path, monkeypatch, capsys):
    real = commands.command_of

    def command_of(name, *rest):  # that script's own tests run it
        return [sys.executable, "-c", "print('a step')"] if name == "step" else real(name, *rest)

    monkeypatch.setattr(commands, "command_of", command_of)
    status = suite.main(["--dry-run", "--out", str(tmp_path)])
    verdicts, rows, log = results(tmp_path)
    needs_gpu = {"no_sync", "workspace", "two_streams", "cuda_graph"}
    for section in SECTIONS:
        if section.name != "baseline":
            words = "SKIP skipped: needs a GPU" if section.name in needs_gpu else "PASS"
            assert verdicts[section.name].startswith(words), log
    assert status == 0 and capsys.readouterr().out.splitlines()[-1] == log.splitlines()[-1]

    assert tuple(rows[0]) == suite.COLUMNS
    assert {row["triton"] for row in rows} == {timings.installed("triton")}
    for shape in timings.SHAPES:
        timed = [(r["case"], r["provider"]) for r in rows if r["shape"] == shape]
        theirs = [(case, who) for who, cases in timings.THEIRS.items() for case in cases]
        assert sorted(timed) == sorted(timings.ALL + theirs)
    for row in rows:
        assert row["seconds"] or row["note"], row
        if row["provider"] == "ours" and row["shape"]:
            assert float(row["seconds"]) > 0 and float(row["x_floor"]) > 0
    assert {"probe_product", "probe_scaled", "probe_row_forward"} <= {row["case"] for row in rows}


def test_another_checkout_is_timed_beside_this_one(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "kepo_kernels", other / "kepo_kernels")
    (other / "benchmarks").mkdir()
    (other / "benchmarks" / "__init__.py").write_text("raise ImportError('those of the other')\n")
    out = tmp_path / "out"
    only = ["--only", "baseline", "--baseline", str(other)]
    assert suite.main(["--dry-run", "--out", str(out), *only]) == 0
    verdicts, rows, _ = results(out)
    assert verdicts["baseline"].startswith("PASS") and len(rows) == 9
    assert {row["provider"] for row in rows} == {"baseline"}
    assert all("other" in row["note"] for row in rows)
    with pytest.raises(AssertionError, match="no other checkout"):
        next(timings.baseline(Clock("cpu", lambda: 60.0)))


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["--out", str(tmp_path)]) == 2
    words = capsys.readouterr()
    assert words.out == "" and words.err.count("\n") == 1 and "no CUDA device" in words.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_section(capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(["--help"])
    words = capsys.readouterr().out
    assert stop.value.code == 0 and "8 minutes at most" in words
    assert all(section.name in words.replace("\n", " ") for section in SECTIONS)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--only", "correct"], "'correct'"),
        (["--seconds", "0"], "positive"),
        (["--wheels", "absent"], "no such folder"),
        (["--baseline", str(ROOT / "tests")], "no kepo_kernels"),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        suite.main(arguments)
    words = capsys.readouterr().err
    assert stop.value.code == 2 and word in words
