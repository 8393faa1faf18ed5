"""The benchmark of whole steps, once in small, and that it notices ways that are not one."""

import csv
import math
from functools import partial

import pytest
import torch

import kepo.objective.step
from benchmarks.loop import phases, report, update, whole
from kepo.models.vlm import VLM
from kepo.objective import score
from kepo.planner.memory import student_of, teachers_of
from kepo_kernels import loss_weights, reference

SMALL = ["--student", "64,1", "--teacher", "128,1", "--vocab", "2048", "--tokens", "8"]
SMALL += ["--prompts", "2", "--generations", "5", "--micro-batch", "4"]


def run(tmp_path, *words):
    """Exit status and rows, which are the same in the file as in the table."""
    results = tmp_path / "deep" / "r.csv"
    status = phases.main([*words, "--csv", str(results)])
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    assert all(row["commit"] and row["torch"] == torch.__version__ for row in rows)
    return status, rows


def names(rows):
    return [(row["gate_rate"], row["phase"], row["way"]) for row in rows]


def numbers(row):
    return {name: float(value) for name, value in row.items() if _is_number(value)}


def _is_number(value):
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


# ---- the three measurements ----


def test_what_a_step_holds(tmp_path, capsys):
    """Gate rate 0 is a step in which the teacher does not run: the policy's loss by itself."""
    picture = tmp_path / "p.png"
    words = ["--gate", "1", "0", "--rival", "whole", "--plot", str(picture)]
    status, rows = run(tmp_path, *SMALL, *words)
    assert status == 0 and picture.stat().st_size > 10_000
    measured = [("update", "fused"), ("optimiser", "fused"), ("update", "whole")]
    assert names(rows) == [(rate, *pair) for rate in ("1", "0") for pair in measured]
    out = capsys.readouterr().out
    assert "planned" in out and "fused/it" in out
    for row in rows:
        have = numbers(row)
        assert have["seconds"] > 0 and have["rounds"] == 1 and row["V"] == "2048"
        assert have["above_mib"] == pytest.approx(have["peak_mib"] - have["held_mib"], abs=0.2)
        assert have["above_mib"] >= 0 and ("planned_mib" in have) == (row["way"] == "fused")
        if row["phase"] == "update":
            assert have["gradient_gap"] <= update.TOLERANCE[torch.float32]
            assert have["teacher_tokens"] == 80 * float(row["gate_rate"])
        assert ("x_peak" in have) == (row["way"] == "whole")


@pytest.mark.slow
def test_what_the_gate_saves(tmp_path):
    picture = tmp_path / "p.png"
    words = ["--gate", "0.5", "0", "--rounds", "2", "--plot", str(picture)]
    status, rows = run(tmp_path, *SMALL, *words)
    assert status == 0 and picture.stat().st_size > 10_000
    assert names(rows) == [
        (rate, "update", way) for rate in ("0.5", "0") for way in ("fused", "states", "everywhere")
    ]
    for row in rows:
        have = numbers(row)
        assert 0 < have["seconds_p20"] <= have["seconds"] <= have["seconds_p80"]
        # 10 completions of 8 tokens; only the way we train asks the teacher about fewer.
        share = float(row["gate_rate"]) if row["way"] == "fused" else 1
        assert have["teacher_tokens"] == 80 * share and have["rounds"] == 2
        assert ("x_seconds" in have) == (row["way"] != "fused")


@pytest.mark.slow
def test_the_scenario_of_a_gpu_at_toy_size(tmp_path, capsys):
    pytest.importorskip("peft")
    status, rows = run(tmp_path, "--device", "cpu", "--seconds", "1000")
    assert status == 0, capsys.readouterr()
    ours = [("update", "fused"), ("teacher", "fused"), ("optimiser", "fused")]
    first = [*ours, ("rollout", "transformers"), ("update", "whole")]
    assert [found[1:] for found in names(rows)] == [*first, *ours, ("update", "whole")]
    for row in rows:
        have = numbers(row)
        assert have["lora_rank"] == 8 and have["seconds"] > 0 and have["peak_mib"] > 0
        assert row["way"] == "whole" or have["planned_mib"] > 0
    plans = {row["phase"]: numbers(row)["planned_mib"] for row in rows if row["planned_mib"]}
    assert plans["teacher"] < plans["update"] and plans["rollout"] != plans["update"]
    # Eight completions of 24 tokens, none of which ends before its limit.
    assert rows[3]["note"].startswith("192 tokens")


def test_the_planner_is_told_what_is_measured(tmp_path, monkeypatch):
    told, shown = [], []
    moments, hidden = phases.moments, VLM.packed_hidden

    def spied(vlm, inputs, *completions):
        images = int(inputs.mm_token_type_ids[0].sum())
        shown.append((vlm.model.config.text_config.hidden_size, inputs.input_ids.shape[1], images))
        return hidden(vlm, inputs, *completions)

    monkeypatch.setattr(VLM, "packed_hidden", spied)
    monkeypatch.setattr(phases, "moments", lambda setup: told.append(setup) or moments(setup))
    status, _ = run(tmp_path, *SMALL, "--gate", "1", "--rival", "whole")
    (setup,) = told
    config, machine, prompts = setup
    student, [teacher] = student_of(config, machine), teachers_of(setup)
    length = prompts.length(student)
    assert status == 0 and prompts.image(student) == 2  # a picture of 32 x 64
    assert set(shown) == {(student.hidden, length, 2), (teacher.hidden, length, 2)}
    assert student.vocab == teacher.vocab == 2048 and student.tied and machine.device == "cpu"


@pytest.mark.slow
def test_matrices_of_the_vocabulary_outweigh_what_else_a_step_allocates(tmp_path):
    words = ["--student", "64,1", "--teacher", "128,1", "--vocab", "50000", "--tokens", "128"]
    words += ["--prompts", "1", "--generations", "8", "--micro-batch", "8"]
    _, rows = run(tmp_path, *words, "--gate", "1", "--rival", "whole")
    fused, _, rival = map(numbers, rows)
    assert fused["held_mib"] == pytest.approx(rival["held_mib"], rel=0.05)
    matrix = 8 * 128 * 50_000 * 4 / 2**20  # MiB
    assert rival["above_mib"] > 7 * matrix
    assert fused["above_mib"] < 4 * matrix and rival["x_above"] < 0.5


# ---- what goes wrong ----


def without_a_row(loss, hidden, *tensors, completion_mask, **settings):
    mask = completion_mask.clone()
    mask[0, -1] = False
    return loss(hidden, *tensors, completion_mask=mask, **settings)


def with_another_gradient(loss, hidden, *tensors, **settings):
    value, stats = loss(hidden, *tensors, **settings)
    return value + 1e-3 * (hidden - hidden.detach()).sum(), stats


@pytest.mark.parametrize("broken", [without_a_row, with_another_gradient])
@pytest.mark.parametrize("rate", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_rival_that_does_something_else_is_noticed(rate, broken, tmp_path, monkeypatch):
    right = update.WAYS["whole"]
    monkeypatch.setitem(update.WAYS, "whole", right._replace(loss=partial(broken, right.loss)))
    status, rows = run(tmp_path, *SMALL, "--gate", rate, "--rival", "whole")
    assert status == 1
    assert f"at gate rate {rate} whole has the loss" in rows[0]["note"] and not rows[0]["seconds"]
    assert names(rows[1:]) == [(rate, "update", "fused"), (rate, "optimiser", "fused")]


def everything(micro, at):
    """The loss takes the states of all sequences too, so loss and gradients are right."""
    return range(len(micro))


def others(micro, at):
    return range(len(at))


@pytest.mark.parametrize(
    "asked, words",
    [
        (everything, "fused gave the teacher 80 completion tokens; expected 40"),
        (others, "states has the loss"),
    ],
)
def test_a_teacher_that_scores_other_sequences_is_noticed(asked, words, tmp_path, monkeypatch):
    right = score._Asked.among
    monkeypatch.setattr(
        score._Asked,
        "among",
        lambda micro, places, given: right(micro, asked(micro, places), given),
    )
    status, rows = run(tmp_path, *SMALL, "--gate", "0.5", "--rounds", "0")
    assert status == 1 and words in str(rows)


TOY = ["--device", "cpu", "--gate", "1", "--rounds", "0"]


@pytest.mark.parametrize(
    "phase, error, status",
    [
        *(
            pytest.param(phase, torch.OutOfMemoryError, 0, marks=pytest.mark.slow)
            for phase in ("rollout", "plan")
        ),
        ("whole", torch.OutOfMemoryError, 0),
        ("rollout", RuntimeError, 1),
    ],
)
def test_a_phase_that_raises_costs_no_other(phase, error, status, tmp_path, monkeypatch):
    pytest.importorskip("peft")

    def fails(*_, **__):
        raise error("planted")

    if phase == "whole":
        monkeypatch.setitem(update.WAYS, "whole", update.WAYS["whole"]._replace(loss=fails))
    else:
        monkeypatch.setattr(
            *{"rollout": (update, "sample"), "plan": (phases, "moments")}[phase], fails
        )
    found, rows = run(tmp_path, *TOY)
    (failed,) = (row for row in rows if "planted" in row["note"])
    assert found == status and phase in (failed["phase"], failed["way"])
    assert not failed["seconds"] and ("out of memory" in failed["note"]) == (status == 0)
    done = [row["phase"] for row in rows if row["seconds"]]
    everything = ["update", "teacher", "optimiser", "rollout", "update"]
    gone = {"rollout": 3, "whole": 4}.get(phase)
    assert done == everything[:gone] + everything[gone + 1 :] if gone else done == everything


def test_what_no_longer_fits_is_left_out(tmp_path):
    pytest.importorskip("peft")
    status, rows = run(tmp_path, *TOY, "--seconds", "0.001")
    assert status == 0 and {row["note"] for row in rows} == {"left out: the time is over"}
    assert [row["way"] or row["phase"] for row in rows] == [
        "plan",
        "fused",
        "transformers",
        "whole",
    ]


def test_gradients_are_compared_parameter_by_parameter(tmp_path):
    """Where loss and length of the gradient are the same, its direction need not be."""
    files = tmp_path / "mine.pt", tmp_path / "truth.pt"
    truth = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "unused": None}

    def gap(**changes):
        torch.save(truth | changes, files[0])
        torch.save(truth, files[1])
        return update.gradient_gap(*files)

    assert gap() == 0
    assert gap(a=torch.tensor([0.0, 3.0])) == pytest.approx(18**0.5 / 5)
    assert math.isnan(gap(b=torch.tensor([math.nan])))
    for changes in (dict(b=None), dict(unused=torch.zeros(1)), dict(c=torch.zeros(1))):
        with pytest.raises(update.Mismatch, match="other parameters have gradients"):
            gap(**changes)


# ---- whole matrices ----


@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize("gate", [[1, 0, 1, 1], [1, 1, 1, 1]])
def test_whole_matrices_against_the_oracle(beta, gate):
    """Four sequences, one of them cut short; and the numbers of their tokens are the fused ones."""
    mask, gate = torch.arange(6) < torch.tensor([6, 6, 4, 6])[:, None], torch.tensor(gate).float()
    hidden, head = torch.randn(4, 6, 8), torch.randn(50, 8)
    teacher, teacher_head = torch.randn(4, 6, 9), torch.randn(50, 9)
    tokens = torch.randint(50, (4, 6)), torch.randn(4)
    settings = dict(completion_mask=mask, beta=beta, distill_coef=0.7)
    settings |= dict(epsilon_low=0.1, epsilon_high=0.3)
    settings["policy_weights"] = loss_weights(mask, None, "sequence_mean")
    settings["distill_weights"] = loss_weights(mask, gate, "token_mean")
    found, numbers = [], []
    for loss, states, also in (
        (whole.kepo_loss, teacher[gate > 0], {}),
        (reference.kepo_loss, teacher, {}),
        (kepo.objective.step.fused_kepo_loss, teacher[gate > 0], {"return_stats": True}),
    ):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        result = loss(*leaves, *tokens, states, teacher_head, **settings, **also)
        if isinstance(result, tuple):
            result, stats = result
            numbers.append(stats[:3])
        found.append((result, *torch.autograd.grad(result, leaves)))
    for mine, truth, _ in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6, check_dtype=False)
    for mine, fused in zip(*numbers, strict=True):
        torch.testing.assert_close(mine, fused, rtol=1e-5, atol=1e-6)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--gate", "0.33"], "whole number of 40 completions"),
        (["--gate", "1.5"], "--gate 1.5"),
        (["--student", "64"], "HIDDEN,LAYERS"),
        (["--teacher", "100,2"], "multiple of 64"),
        (["--vocab", "100"], "at least 512"),
        (["--generations", "1"], "at least 2"),
        (["--micro-batch", "0"], "--micro-batch 0"),
        (["--rounds", "-1"], "--rounds"),
        pytest.param(["--device", "cuda"], "no CUDA device", marks=NO_GPU),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        phases.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        phases.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" in out and all(way in out for way in update.WAYS)
