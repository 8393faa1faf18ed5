"""TRL's trainers with our losses, as whole runs: pictures, two processes, rewards that rise."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

import torch
import trl_sharded
import trl_vlm
from places import ROOT, SUPPORT
from several import torchrun
from trl import GRPOTrainer

from benchmarks.trl.grpo_equality import Outcome, difference, outcome
from benchmarks.trl.tiny_models import write_model
from kepo_kernels import FusedHead, head_of, reference
from kepo_kernels.integrations.trl import KepoGRPOTrainer, fuse_head

pytestmark = pytest.mark.slow
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("vlm")
    trl_vlm.write(made)
    return made


def first_batch(made):
    """One of the micro-batches that a trainer makes of a generation."""
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made._prepare_inputs(next(iter(made.get_train_dataloader())))


def test_pictures_of_open_completions_alone_reach_the_teacher(folder):
    """The joint loss of a micro-batch is TRL's loss and the oracle's divergence, one completion at
    a time, on whole logits."""
    teacher = trl_vlm.model_in(folder / "teacher")
    how = dict(settings=dict(loss_type="dapo", gradient_accumulation_steps=2))
    more = dict(teacher_model=teacher, gate_reward="half", distill_coef=0.7)
    made = trl_vlm.trainer(KepoGRPOTrainer, folder, **how, **more)
    given = first_batch(made)
    gate = given["kepo_gate"]
    assert 0 < gate.sum() < len(gate)
    found = outcome(made, given)
    theirs = trl_vlm.trainer(GRPOTrainer, folder, **how)
    theirs.current_gradient_accumulation_steps = 1
    theirs.model.train().zero_grad()
    FusedHead.install(theirs.model)
    loss = theirs._compute_loss(theirs.model, given)
    expected = loss + 0.7 * divergences(theirs, teacher, given)
    expected.backward()
    gradients = [p.grad.flatten() for p in theirs.model.parameters() if p.grad is not None]
    away = difference(found, Outcome(float(expected.detach()), torch.cat(gradients).double(), {}))
    assert away.loss < 1e-5 and away.gradient < 1e-5, away
    assert float((expected - loss).detach()) > 1e-3


def divergences(trainer, teacher, given):
    """The weighted divergence of open completions, each of which is computed alone."""
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    length = given["completion_ids"].size(1)
    images = torch.tensor([0, *given["num_images"]]).cumsum(0).tolist()
    patches = given["image_grid_thw"].prod(-1)
    total = 0.0
    for row in given["kepo_gate"].nonzero().flatten().tolist():
        first, last = images[row], images[row + 1]
        pixels = slice(int(patches[:first].sum()), int(patches[:last].sum()))
        inputs = dict(
            input_ids=ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            pixel_values=given["pixel_values"][pixels],
            image_grid_thw=given["image_grid_thw"][first:last],
            mm_token_type_ids=given["mm_token_type_ids"][row : row + 1],
        )

        def states(model, inputs=inputs):
            return model.base_model(**inputs).last_hidden_state[:, -length - 1 : -1]

        with torch.no_grad():
            of_teacher = states(teacher)
        total = total + reference.gated_kd_loss(
            states(trainer.model),
            head_of(trainer.model),
            of_teacher,
            head_of(teacher),
            weights=given["completion_mask"][row : row + 1].double(),
        )
    steps = trainer.args.steps_per_generation
    tokens = given["kepo_open_tokens"] * trainer.current_gradient_accumulation_steps / steps
    return (total / tokens).float()


def rewards(log):
    found = [entry["rewards/share/mean"] for entry in log if "rewards/share/mean" in entry]
    return sum(found[:5]) / 5, sum(found[-5:]) / 5


@pytest.fixture(scope="module")
def ranks(folder):
    """What two processes have written."""
    ended = torchrun(
        SUPPORT / "trl_vlm.py", folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = ended.communicate(timeout=280)
    assert ended.returncode == 0, output[-4000:]
    return [json.loads((folder / f"rank{n}.json").read_text()) for n in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize("adapter", ["fuse_head", "joint"])
def test_three_steps_in_two_processes_are_trls(ranks, adapter):
    """DDP with TRL's settings: the same completions, metrics and weights."""
    for rank in ranks:
        expected, found = rank["steps"]["trl"], rank["steps"][adapter]
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-4, abs=1e-4)
        for one, other in zip(expected["log"], found["log"], strict=True):
            assert one.keys() <= other.keys()
            for name in one.keys() - {"step_time"}:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.processes
def test_a_model_with_pictures_learns_in_two_processes(ranks):
    first, last = rewards(ranks[0]["log"])
    assert last > first + 0.3
    assert ranks[0]["weights"] == ranks[1]["weights"]  # so their gradients were one
    shares = [x["kepo/open_share"] for x in ranks[0]["log"] if "kepo/open_share" in x]
    assert set(shares) == {0.5}


@pytest.mark.processes
def test_the_example_learns_in_two_processes(tmp_path):
    script = ROOT / "examples" / "in_trainers" / "trl_grpo.py"
    ended = torchrun(script, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = ended.communicate(timeout=200)
    assert ended.returncode == 0, output[-4000:]
    first, last = two_numbers(output)
    assert last > first + 0.5


def test_the_example_learns(tmp_path):
    script = ROOT / "examples" / "in_trainers" / "trl_grpo.py"
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    first, last = two_numbers(ended.stdout)
    assert last > first + 0.5


def two_numbers(output):
    [line] = [x for x in output.splitlines() if x.startswith("mean share")]
    return (float(word.strip(",")) for word in line.split() if word[0].isdigit())


def test_a_run_by_the_fused_head_is_trls_own(folder):
    """Three steps from the same seed: the same completions, rewards and losses."""
    logs = []
    for change in (lambda made: made, fuse_head):
        made = change(trl_vlm.trainer(GRPOTrainer, folder, settings={"max_steps": 3}))
        made.train()
        logs.append(made.state.log_history[:3])
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"step_time"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


@pytest.mark.processes
@pytest.mark.parametrize("adapter", ["fuse_head", "KepoGRPOTrainer"])
def test_gradients_of_a_sharded_model_are_those_of_one_process(tmp_path, adapter):
    """FSDP2 as accelerate shards it, whose head TRL's own code gathers in pieces."""
    write_model(tmp_path / "llama")
    write_model(tmp_path / trl_sharded.KNOWING, seed=7, hidden=48)
    script = SUPPORT / "trl_sharded.py", tmp_path, adapter
    ended = torchrun(*script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = ended.communicate(timeout=120)
    assert ended.returncode == 0, output[-4000:]
    found = torch.load(tmp_path / f"{adapter}.pt")
    one = trl_sharded.made(adapter, tmp_path)
    expected = trl_sharded.gradients(one, one.model, trl_sharded.given(one))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 2e-6 * float(gradient.norm()), name


@pytest.mark.processes
def test_distillation_in_two_processes_is_trls(tmp_path):
    write_model(tmp_path / "pupil")
    write_model(tmp_path / "teacher", seed=5, hidden=48)
    script = SUPPORT / "trl_distilled.py", tmp_path
    ended = torchrun(*script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = ended.communicate(timeout=120)
    assert ended.returncode == 0, output[-4000:]
    for rank in range(2):
        theirs, ours = torch.load(tmp_path / f"rank{rank}.pt")
        for one, other in zip(theirs["log"], ours["log"], strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        assert float((ours["after"] - theirs["after"]).abs().max()) < 1e-6
        assert float((theirs["after"] - theirs["before"]).abs().max()) > 1e-3
