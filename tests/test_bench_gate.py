"""The gate's benchmark, once in small, and that it notices a skip that is none, or a wrong one."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import kepo.step

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_gate

SMALL = ["--student", "64,1", "--teacher", "128,1", "--vocab", "512", "--tokens", "4"]
SMALL += ["--prompts", "2", "--generations", "5", "--micro-batch", "4", "--rounds", "1"]


def test_table_csv_and_picture(tmp_path, capsys):
    results, picture = tmp_path / "deep" / "r.csv", tmp_path / "p.png"
    bench_gate.main([*SMALL, "--csv", str(results), "--plot", str(picture)])
    assert "teacher tokens" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000

    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == bench_gate.COLUMNS
    assert len(rows) == 4 * len(bench_gate.WAYS)
    for row in rows:
        assert row["commit"] and row["torch"] == torch.__version__ and row["rounds"] == "1"
        assert 0 < float(row["seconds_p20"]) <= float(row["seconds"]) <= float(row["seconds_p80"])
        assert row["way"] != "whole" or float(row["x_whole"]) == 1
        # 10 completions of 4 tokens; only the way we train asks the teacher about fewer.
        share = float(row["gate_rate"]) if row["way"] == "open" else 1
        assert int(row["teacher_tokens"]) == 40 * share
        assert int(row["teacher_parameters"]) > int(row["student_parameters"]) > 0


def plant(monkeypatch, broken):
    """Replaces what asks the teacher for the states of open sequences."""
    right = kepo.step._open_hidden
    monkeypatch.setattr(
        kepo.step, "_open_hidden", lambda teacher, micro, at: broken(right, teacher, micro, at)
    )


def test_a_teacher_that_scores_everything_is_noticed(monkeypatch):
    """The loss takes the states of all sequences too, so loss and gradients are right."""
    plant(monkeypatch, lambda f, teacher, micro, at: f(teacher, micro, torch.arange(len(micro))))
    with pytest.raises(SystemExit, match=r"open gave the teacher 40 .* tokens; expected 20"):
        bench_gate.main([*SMALL, "--rate", "0.5"])


def test_a_teacher_that_scores_the_wrong_sequences_is_noticed(monkeypatch):
    plant(monkeypatch, lambda f, teacher, micro, at: f(teacher, micro, torch.arange(len(at))))
    with pytest.raises(SystemExit, match="open has the loss"):
        bench_gate.main([*SMALL, "--rate", "0.5"])


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--rate", "0.33"], "whole number of 40 completions"),
        (["--rate", "1.5"], "--rate 1.5"),
        (["--student", "64"], "HIDDEN,LAYERS"),
        (["--teacher", "100,2"], "multiple of 64"),
        (["--vocab", "100"], "at least 512"),
        (["--generations", "1"], "at least 2"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gate.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gate.main(["--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out
