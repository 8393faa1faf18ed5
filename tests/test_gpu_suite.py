"""The suite for the GPU, run on the CPU: it reaches its end whatever happens, and it can fail."""

import contextlib
import csv
import importlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import floor
import gpu_checks
import gpu_problems
import gpu_suite
import gpu_targets
import gpu_timings
import gpu_tools
import problems
from gpu_clock import Clock, Skipped
from gpu_sections import SECTIONS, Section

import kepo_kernels

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
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
        status = gpu_suite.main(["--dry-run", "--out", str(out), *arguments], tuple(known))
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
    arguments = ["--seconds", str(gpu_suite.SPARE + 2.5)]
    status, verdicts, rows, log = planted("slow", "hangs", more, arguments=arguments)
    assert status == 1 and rows == []
    assert verdicts["slow"].startswith("PASS") and "FAIL killed after" in verdicts["hangs"]
    assert verdicts["good"].startswith("LATE left out: the time is over")
    assert "2 sections passed, 1 failed, 0 skipped, 1 left out" in log
    taken = float(log.rpartition("and .log, ")[2].split()[0])
    assert taken <= gpu_suite.SPARE + 2.5


def test_when_no_process_starts_it_ends(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "WORKER", tmp_path / "absent.py")
    status, verdicts, _, log = planted("good", "slow", "peer")
    assert status == 1 and "can't open file" in log
    found = [words.rpartition(" (")[0] for words in verdicts.values()]
    assert (
        found == ["FAIL its process ended with exit status 2"] * 2 + ["FAIL no process starts"] * 2
    )


def test_commands_are_sections_too(planted, monkeypatch):
    def command_of(name, dry_run, stem, limit):
        if name == "step":
            raise FileNotFoundError("there is no benchmarks/loop/step.py")
        if name == "racecheck":
            raise Skipped("compute-sanitizer is not on PATH")
        said = {"memcheck": "print('0 errors')", "ncu": "exit('ERR_NVGPUCTRPERM: the user ...')"}
        said |= {"fails": "exit('2 errors')", "sleeps": "import time; time.sleep(600)"}
        return [sys.executable, "-c", said[name]]

    monkeypatch.setattr(gpu_tools, "command_of", command_of)
    names = ("step", "racecheck", "memcheck", "ncu", "fails")
    late = Section("sleeps", limit=0.5, needs=0)
    status, verdicts, _, log = planted(*(Section(n, needs=0) for n in names), late)
    assert status == 1 and "2 errors" in log
    found = [words.rpartition(" (")[0] for words in verdicts.values()][1:]
    assert found == [
        "FAIL FileNotFoundError: there is no benchmarks/loop/step.py",
        "SKIP skipped: compute-sanitizer is not on PATH",
        "PASS 0 errors",
        "SKIP skipped: the counters of the device may not be read here",
        "FAIL ended with exit status 1: 2 errors",
        "LATE killed after 0 s: it printed nothing",
    ]


def test_commands_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda tool, path=None: f"/cuda/bin/{tool}")
    monkeypatch.setattr(gpu_tools, "HERE", tmp_path)
    stem = tmp_path / "h100"
    with pytest.raises(FileNotFoundError, match=r"loop/step.py"):
        gpu_tools.command_of("step", False, stem, 150)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "step.py").touch()
    step = gpu_tools.command_of("step", False, stem, 150)
    assert step[2:] == ["--device", "cuda", "--csv", f"{stem}_step.csv", "--seconds", "90"]
    assert gpu_tools.command_of("step", False, stem, 60)[-1] == "45"
    assert gpu_tools.command_of("step", True, stem, 60)[2:4] == ["--device", "cpu"]
    ncu, check = (gpu_tools.command_of(n, False, stem, 60) for n in ("ncu", "memcheck"))
    assert ncu[:3] == ["/cuda/bin/ncu", "--clock-control", "none"]
    assert check[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "memcheck"]
    for command in (ncu, check):
        assert callable(getattr(gpu_tools, command[command.index("--once") + 1]))
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda tool, path=None: None)
    with pytest.raises(Skipped, match="ncu is not on PATH"):
        gpu_tools.command_of("ncu", False, stem, 60)


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


def test_dry_run_visits_every_section(tmp_path, monkeypatch, capsys):
    real = gpu_tools.command_of

    def command_of(name, *rest):  # that script's own tests run it
        return [sys.executable, "-c", "print('a step')"] if name == "step" else real(name, *rest)

    monkeypatch.setattr(gpu_tools, "command_of", command_of)
    status = gpu_suite.main(["--dry-run", "--out", str(tmp_path)])
    verdicts, rows, log = results(tmp_path)
    needs_gpu = {"no_sync", "workspace", "two_streams", "cuda_graph"}
    for section in SECTIONS:
        if section.name != "baseline":
            words = "SKIP skipped: needs a GPU" if section.name in needs_gpu else "PASS"
            assert verdicts[section.name].startswith(words), log
    assert status == 0 and capsys.readouterr().out.splitlines()[-1] == log.splitlines()[-1]

    assert tuple(rows[0]) == gpu_suite.COLUMNS
    assert {row["triton"] for row in rows} == {gpu_timings.installed("triton")}
    for shape in gpu_timings.SHAPES:
        timed = [(r["case"], r["provider"]) for r in rows if r["shape"] == shape]
        theirs = [(case, who) for who, cases in gpu_timings.THEIRS.items() for case in cases]
        assert sorted(timed) == sorted(gpu_timings.ALL + theirs)
    for row in rows:
        assert row["seconds"] or row["note"], row
        if row["provider"] == "ours" and row["shape"]:
            assert float(row["seconds"]) > 0 and float(row["x_floor"]) > 0
    assert {"probe_product", "probe_scaled", "probe_row_forward"} <= {row["case"] for row in rows}


def test_another_checkout_is_timed_beside_this_one(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "kepo_kernels", other / "kepo_kernels")
    out = tmp_path / "out"
    only = ["--only", "baseline", "--baseline", str(other)]
    assert gpu_suite.main(["--dry-run", "--out", str(out), *only]) == 0
    verdicts, rows, _ = results(out)
    assert verdicts["baseline"].startswith("PASS") and len(rows) == 9
    assert {row["provider"] for row in rows} == {"baseline"}
    assert all(str(other / "kepo_kernels") in row["note"] for row in rows)
    with pytest.raises(AssertionError, match="no other checkout"):
        next(gpu_timings.baseline(Clock("cpu", lambda: 60.0)))


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    words = capsys.readouterr()
    assert words.out == "" and words.err.count("\n") == 1 and "no CUDA device" in words.err
    assert not list(tmp_path.iterdir())


def test_help_names_every_section(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--help"])
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
        gpu_suite.main(arguments)
    words = capsys.readouterr().err
    assert stop.value.code == 2 and word in words


def test_a_wrong_gradient_fails_and_hides_no_other(monkeypatch, capsys):
    right = kepo_kernels.fused_gated_kd_loss

    def wrong(*args, beta, **kwargs):
        if beta == 1:
            raise TypeError("no such kernel")
        loss = right(*args, beta=beta, **kwargs)
        return loss.detach() + 1.05 * (loss - loss.detach())

    monkeypatch.setattr(kepo_kernels, "fused_gated_kd_loss", wrong)
    for name in ("correct_bf16", "correct_softcap", "correct_fp16", "correct_fp32"):
        with pytest.raises(AssertionError, match=r"of \d+ calls' numbers: kd, \w+, dhidden"):
            gpu_checks.CHECKS[name](CPU)
        out = capsys.readouterr().out
        assert "kd beta 0" in out and "TypeError: no such kernel" in out
        assert "grpo" in out and "FAIL grpo" not in out


class Underflow(torch.autograd.Function):
    """Hands the gradient through fp16 as small as the loss has made it there."""

    @staticmethod
    def forward(ctx, x, smallness):
        ctx.smallness = smallness
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        small = (gradient.double() * ctx.smallness).to(torch.float16)
        return (small.double() / ctx.smallness).to(gradient.dtype), None


@pytest.mark.parametrize("name", ["fp16_range", "correct_fp16"])
def test_underflow_of_fp16_is_seen(name, monkeypatch, capsys):
    assert "error at most" in gpu_checks.CHECKS[name](CPU)
    right = kepo_kernels.fused_gated_kd_loss

    def wrong(hidden, lm_head, *args, **kwargs):
        if hidden.dtype == torch.float16:  # gradients of up to 1024 become 6e-6: not all vanish
            hidden, lm_head = (Underflow.apply(x, 2.0**-27) for x in (hidden, lm_head))
        return right(hidden, lm_head, *args, **kwargs)

    monkeypatch.setattr(kepo_kernels, "fused_gated_kd_loss", wrong)
    with pytest.raises(AssertionError, match=r"kd.*d(hidden|lm_head)"):
        gpu_checks.CHECKS[name](CPU)


def test_rounding_to_fp16_knows_no_range(monkeypatch):
    monkeypatch.setattr(gpu_problems.gemm, "dlogits_dtype", lambda *_: torch.float16)
    x = torch.randn(1000, dtype=torch.float64)
    small = gpu_problems.round_dlogits(x * 2.0**-40, torch.empty(0))
    assert torch.equal(small * 2.0**40, x.to(torch.float16).double())


def test_different_bits_fail(monkeypatch):
    """A loss that is right to the last but one bit is not repeatable."""
    calls = iter(range(1000))
    monkeypatch.setitem(
        gpu_checks.LOSSES,
        "grpo",
        lambda p, fused, **engine: gpu_checks.grpo(p, fused, **engine) * (1 + 1e-6 * next(calls)),
    )
    with pytest.raises(AssertionError, match="grpo, call 1 differs"):
        gpu_checks.repeatable(CPU)


def test_a_call_that_raises_is_a_row_and_costs_no_other(monkeypatch, capsys):
    def crash(problem, case):
        raise RuntimeError("out of memory\nand more")

    right = gpu_timings.ours
    monkeypatch.setattr(
        gpu_timings, "ours", lambda p, case: crash(p, case) if case == "grpo" else right(p, case)
    )
    monkeypatch.setitem(gpu_timings.PEERS, "eager", crash)
    wanted = [("ce", "eager"), ("grpo", "ours"), ("ce", "ours")]
    rows = gpu_timings.losses(Clock("cpu", lambda: 60.0), "small", wanted)
    found = [next(rows) for _ in wanted]
    for row in found[:2]:
        assert row["note"] == "fails here: RuntimeError: out of memory" and "seconds" not in row
    assert found[2]["seconds"] > 0 and capsys.readouterr().out.count("Traceback") == 2
    with pytest.raises(
        AssertionError, match="grpo ours could not be timed"
    ):  # a peer's is no fault
        next(rows)


def test_floor_multiplies_what_the_row_kernels_write(monkeypatch):
    """On CUDA that is 16 bits, beside fp32 logits; forward alone has no gradient products."""
    shape = problems.Shape("tiny", *gpu_timings.TINY, {})
    problem = problems.Problem.make(shape, torch.bfloat16, CPU)
    seen = []
    monkeypatch.setattr(floor.gemm, "default_logits_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(floor.gemm, "dlogits_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(floor.gemm, "project_", lambda out, *_: seen.append(out.dtype))
    monkeypatch.setattr(floor.gemm, "hidden_gradient", lambda g, w: seen.append(g.dtype))
    monkeypatch.setattr(floor.gemm, "accumulate_head_", lambda dw, g, x: seen.append(g.dtype))
    counts = {"joint_half": (7, 3), "grpo": (3, 1), "logprobs_forward": (1, 1)}
    for case, (products, projections) in counts.items():
        seen.clear()
        floor.floor(problem, case)()
        wide = [dtype for dtype in seen if dtype == torch.float32]
        assert (len(seen), len(wide)) == (products, projections), case


def test_goals_are_those_of_the_card():
    row = {"shape": gpu_targets.FIRST_SHAPE, "case": "kd_open", "provider": "ours", "note": ""}
    row |= {"seconds": 0.047, "seconds_p20": 0.046, "seconds_p80": 0.048, "peak_mib": 5000.0}
    floors = {(row["shape"], "kd_open"): 0.04, (row["shape"], "joint"): 0.047}
    h200 = gpu_targets.judged(row, "NVIDIA H200", floors)
    assert (h200["target"], h200["met"], h200["x_floor"]) == (46.5e-3, "no", pytest.approx(1.175))
    assert gpu_targets.judged(row | {"case": "kd_beta1"}, "", floors)["x_floor"] > 1.17
    h100 = gpu_targets.judged(row, "NVIDIA H100 80GB HBM3", floors)
    assert "target" not in h100 and h100["note"] == "modelled for an H100: 56 ms"
    other = row | {"shape": gpu_targets.PUBLISHED_SHAPE, "note": "a note"}
    found = gpu_targets.judged(other, "NVIDIA H100 80GB HBM3", floors)
    assert found["met"] == "yes" and "5.24 of 5.8 GB" in found["note"]
    found = gpu_targets.judged(other | {"peak_mib": 6000.0}, "NVIDIA H100", floors)
    assert found["met"] == "no" and "x_floor" not in found
    assert gpu_targets.judged(row | {"provider": "eager"}, "NVIDIA H200", {}).get("target") is None


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """What the checks that need a GPU call of torch.cuda, so that each of their lines is run."""
    kept = []
    right = gpu_checks.run

    def run(p):
        kept.append(right(p))
        return kept[-1]

    class Graph:
        def replay(self):
            for x, y in zip(kept[-1], kept[-2], strict=True):
                x.copy_(y)

    fakes = {name: lambda *_: contextlib.nullcontext() for name in ("stream", "graph")}
    fakes |= {name: lambda *_: 0 for name in ("memory_allocated", "max_memory_allocated")}
    fakes |= {"set_sync_debug_mode": lambda mode: None, "synchronize": lambda: None}
    fakes |= {"reset_peak_memory_stats": lambda: None, "current_stream": FakeStream}
    fakes |= {"CUDAGraph": Graph, "Stream": FakeStream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu_checks, "needs_gpu", lambda device: None)
    monkeypatch.setattr(gpu_checks, "run", run)


@pytest.mark.parametrize("name", ["no_sync", "cuda_graph", "two_streams", "workspace"])
def test_checks_that_need_a_gpu_have_no_slips(name, fake_cuda):
    assert gpu_checks.CHECKS[name](CPU)
