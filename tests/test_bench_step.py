"""The benchmark of a whole step, once in small, and that it notices two ways that are not one."""

import argparse
import csv
import math
import sys
from pathlib import Path

import pytest
import torch

import kepo.step
from kepo_kernels import loss_weights, reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_step
import whole

SMALL = ["--student", "64,1", "--teacher", "128,1", "--vocab", "2048", "--tokens", "32"]
SMALL += ["--prompts", "1", "--generations", "4", "--micro-batch", "3"]


def here(work, *arguments):
    return work(*arguments)


@pytest.fixture
def one_process(monkeypatch):
    """Steps in this process: a start of the interpreter takes longer than they do."""
    monkeypatch.setattr(bench_step, "in_fresh_process", here)


def bench(tmp_path, *words):
    results, picture = tmp_path / "deep" / "r.csv", tmp_path / "p.png"
    bench_step.main([*SMALL, *words, "--csv", str(results), "--plot", str(picture)])
    assert picture.stat().st_size > 10_000
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def check(rows):
    assert tuple(rows[0]) == bench_step.COLUMNS
    for row in rows:
        assert row["commit"] and row["torch"] == torch.__version__ and row["V"] == "2048"
        assert row["completion_tokens"] == "128" and row["micro_batch"] == "3"
        assert float(row["seconds"]) > 0 and float(row["gradient_gap"]) <= bench_step.TOLERANCE
        above = float(row["peak_mib"]) - float(row["held_mib"])
        assert float(row["above_mib"]) == pytest.approx(above, abs=0.2) and above > 0
        assert row["way"] != "whole" or float(row["x_peak"]) == float(row["x_above"]) == 1


def test_both_ways_agree_and_the_table_is_written(tmp_path, capsys, monkeypatch, one_process):
    """Gate rate 0 is a step in which the teacher does not run: the policy's loss by itself."""
    called = []
    for way, losses in bench_step.WAYS.items():
        for name, loss in losses.items():
            monkeypatch.setitem(losses, name, noted(called, (way, name), loss))
    ours = kepo.step.fused_kepo_loss
    rows = bench(tmp_path, "--rate", "1", "0")
    check(rows)
    assert [(row["gate_rate"], row["way"]) for row in rows] == [
        (rate, way) for rate in ("1", "0") for way in ("fused", "whole")
    ]
    assert {row["student"] for row in rows} == {"64,1"}
    assert "gradient off" in capsys.readouterr().out
    # Each way called its own losses, once in each of two micro-batches; and both are gone again.
    assert called[:4] == 2 * [("fused", "fused_kepo_loss")] + 2 * [("whole", "fused_kepo_loss")]
    assert called[4:] == 2 * [("fused", "fused_grpo_loss")] + 2 * [("whole", "fused_grpo_loss")]
    assert kepo.step.fused_kepo_loss is ours


def noted(called, name, loss):
    def call(*args, **kwargs):
        called.append(name)
        return loss(*args, **kwargs)

    return call


@pytest.mark.slow
def test_memory_in_processes_of_their_own(tmp_path):
    """At a size where matrices of the vocabulary outweigh what else a step allocates."""
    words = ["--vocab", "50000", "--generations", "8", "--micro-batch", "8", "--tokens", "128"]
    fused, whole_step = bench(tmp_path, "--rate", "1", *words)
    assert float(fused["held_mib"]) == pytest.approx(float(whole_step["held_mib"]), rel=0.02)
    matrix = 8 * 128 * 50_000 * 4 / 2**20  # MiB
    assert float(whole_step["above_mib"]) > 7 * matrix
    assert float(fused["above_mib"]) < 4 * matrix and float(fused["x_above"]) < 0.5


@pytest.mark.parametrize("planted", ["kepo_loss", "grpo_loss"])
def test_a_way_that_drops_a_row_is_noticed(planted, tmp_path, monkeypatch, one_process):
    right = getattr(whole, planted)

    def without_a_row(*tensors, completion_mask, **settings):
        mask = completion_mask.clone()
        mask[0, -1] = False
        return right(*tensors, completion_mask=mask, **settings)

    monkeypatch.setitem(bench_step.WAYS["whole"], f"fused_{planted}", without_a_row)
    rate = {"kepo_loss": "1", "grpo_loss": "0"}[planted]
    with pytest.raises(SystemExit, match=f"at gate rate {rate} fused has the loss"):
        bench(tmp_path, "--rate", rate)


def test_gradients_are_compared_parameter_by_parameter(tmp_path):
    """Where loss and length of the gradient are the same, its direction need not be."""
    files = tmp_path / "mine.pt", tmp_path / "truth.pt"
    truth = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "unused": None}

    def gap(**changes):
        torch.save(truth | changes, files[0])
        torch.save(truth, files[1])
        return bench_step.gradient_gap(*files)

    assert gap() == 0
    assert gap(a=torch.tensor([0.0, 3.0])) == pytest.approx(18**0.5 / 5)
    step = bench_step.Step({}, 2.0, 1.0, 1.0, 0.5, 5.0)
    bench_step.check_same({"fused": step, "whole": step}, 0.9e-5, 1.0)
    for mine, off in ((step, 1.1e-5), (step._replace(loss=0.50001), 0.0), (step, math.nan)):
        with pytest.raises(SystemExit, match="fused has the loss"):
            bench_step.check_same({"fused": mine, "whole": step}, off, 1.0)
    for changes in (dict(b=None), dict(unused=torch.zeros(1)), dict(c=torch.zeros(1))):
        with pytest.raises(SystemExit, match="other parameters have gradients"):
            gap(**changes)


def problem():
    """Four sequences, one of them closed and one cut short."""
    mask = torch.arange(6) < torch.tensor([6, 6, 4, 6])[:, None]
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0])
    shapes = dict(hidden=(4, 6, 8), lm_head=(50, 8), teacher=(4, 6, 9), teacher_head=(50, 9))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return argparse.Namespace(
        **tensors,
        targets=torch.randint(50, (4, 6)),
        advantages=torch.randn(4),
        gate=gate,
        mask=mask,
        policy_weights=loss_weights(mask, None, "sequence_mean"),
        distill_weights=loss_weights(mask, gate, "token_mean"),
    )


@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize("gate", [[1, 0, 1, 1], [1, 1, 1, 1]])
def test_whole_matrices_against_the_oracle(beta, gate):
    p = problem()
    p.gate = torch.tensor(gate).float()
    p.distill_weights = loss_weights(p.mask, p.gate, "token_mean")
    clip = dict(epsilon_low=0.1, epsilon_high=0.3)
    common = dict(completion_mask=p.mask, gate=p.gate, beta=beta, distill_coef=0.7, **clip)
    weights = dict(policy_weights=p.policy_weights, distill_weights=p.distill_weights)
    policy = (p.targets, p.advantages)
    found = []
    for loss, teacher in (
        (whole.kepo_loss, p.teacher[p.gate > 0]),
        (reference.kepo_loss, p.teacher),
    ):
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.lm_head)]
        result = loss(*leaves, *policy, teacher, p.teacher_head, **common, **weights)
        value = result[0] if isinstance(result, tuple) else result
        found.append((value, *torch.autograd.grad(value, leaves)))
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_numbers_of_the_tokens_are_those_of_the_fused_loss():
    p = problem()
    settings = dict(
        gate=p.gate,
        completion_mask=p.mask,
        policy_weights=p.policy_weights,
        distill_weights=p.distill_weights,
        distill_coef=1.0,
        beta=0.5,
        epsilon_low=0.2,
        epsilon_high=0.2,
        return_stats=True,
    )
    tensors = (p.hidden, p.lm_head, p.targets, p.advantages, p.teacher[p.gate > 0], p.teacher_head)
    (loss, stats), (truth, expected) = (
        kepo_loss(*tensors, **settings)
        for kepo_loss in (whole.kepo_loss, kepo.step.fused_kepo_loss)
    )
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(stats[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_settings_that_whole_matrices_do_not_know_are_refused():
    for setting in (dict(kl_coef=0.1), dict(temperature=0.5), dict(unheard_of=1)):
        with pytest.raises(ValueError, match="know the settings of a default run only"):
            whole.refuse_others({**whole.DEFAULTS, "impl": "auto", **setting})
    whole.refuse_others({**whole.DEFAULTS, "impl": "auto"})


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--rate", "0.33"], "whole number of 16 completions"),
        (["--student", "64"], "HIDDEN,LAYERS"),
        (["--micro-batch", "0"], "--micro-batch 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_step.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err
