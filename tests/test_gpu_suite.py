"""The suite for the GPU, run on the CPU: it reaches its end, and it can fail."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_checks
import gpu_suite
import gpu_timings
from losses_of_ours import NotComparable

import kepo_kernels

CPU = torch.device("cpu")
NEEDS_GPU = {"no_sync", "cuda_graph", "workspace", "two_streams", "memcheck", "racecheck"}
NEEDS_GPU |= {"one_chunk_beyond_int32", "chunks_beyond_int32"}


def results(folder: Path, ending: str) -> Path:
    (found,) = folder.glob(f"dry-run_*.{ending}")
    return found


def test_dry_run_reaches_its_end(tmp_path, monkeypatch, capsys):
    for module in ("trl.kernels", "liger_kernel.chunked_loss", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed

    def absent(problem, case):
        raise NotComparable("compiling takes seconds")

    monkeypatch.setitem(gpu_timings.PEERS, "compiled", absent)
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    verdicts = {
        line.split()[1]: line for line in out.splitlines() if line[:5] in ("PASS ", "SKIP ")
    }
    assert set(verdicts) == set(gpu_checks.CHECKS)
    for name, line in verdicts.items():
        assert line.startswith("SKIP" if name in NEEDS_GPU else "PASS"), line
        assert ("skipped: needs a GPU" in line) == (name in NEEDS_GPU)
    assert out.splitlines()[-1] == "6 checks passed, 0 failed, 8 skipped"
    assert results(tmp_path, "log").read_text() == out

    with results(tmp_path, "csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == gpu_suite.COLUMNS
    for shape in gpu_timings.SHAPES:
        mine = {(r["case"], r["provider"]): r for r in rows if r["shape"] == shape}
        for case, providers in gpu_timings.PROVIDERS.items():
            assert float(mine[case, "ours"]["seconds"]) > 0
            for who in providers:
                row = mine[case, who]
                assert row["seconds"] or row["note"], row
        assert "trl >= 1.16 cannot be imported" in mine["kd_open", "trl"]["note"]
    assert all(float(r["gb_per_s"]) > 0 for r in rows if r["case"].startswith("row_"))
    assert {r["triton"] for r in rows} == {gpu_suite.triton_version()}


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    words = capsys.readouterr()
    assert words.out == "" and words.err.count("\n") == 1 and "no CUDA device" in words.err
    assert not list(tmp_path.iterdir())


def test_a_wrong_gradient_fails(tmp_path, monkeypatch, capsys):
    right = kepo_kernels.fused_gated_kd_loss

    def wrong(*args, **kwargs):
        loss = right(*args, **kwargs)
        return loss.detach() + 1.05 * (loss - loss.detach())

    monkeypatch.setattr(kepo_kernels, "fused_gated_kd_loss", wrong)
    names = [name for name in gpu_checks.CHECKS if name.startswith("correct_")]
    assert gpu_suite.main(["--dry-run", "--only", *names, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL correct_") == 3 and "kd, plain, dhidden" in out
    assert out.splitlines()[-1] == "0 checks passed, 3 failed, 0 skipped"


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


def test_a_step_that_crashes_costs_no_other(tmp_path, monkeypatch, capsys):
    def crash(clock):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setitem(gpu_suite.TIMINGS, "rows", crash)
    only = ["--only", "ceilings", "rows"]
    assert gpu_suite.main(["--dry-run", *only, "--out", str(tmp_path)]) == 1
    assert "rows: RuntimeError: out of memory" in capsys.readouterr().out
    assert "matmul" in results(tmp_path, "csv").read_text()


def test_what_does_not_fit_is_named(tmp_path, capsys):
    only = ["--only", "correct_bf16", "rows", "--seconds", "1"]
    assert gpu_suite.main(["--dry-run", *only, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "SKIP correct_bf16" in out and out.count("left out") == 2


def test_unknown_names_are_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--only", "correct"])
    words = capsys.readouterr().err
    assert stop.value.code == 2 and "'correct'" in words
    assert all(name in words for name in (*gpu_checks.CHECKS, *gpu_timings.TIMINGS))
