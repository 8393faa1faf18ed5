"""The whole loop on a tiny real model: it runs, resumes to the bit after kill -9, and stops on a
signal.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kepo.config import Config
from kepo.digits import write_digits
from kepo.errors import KepoConfigError
from kepo.metrics import MetricsLog, read_metrics
from kepo.tiny import build_tiny
from kepo.train import draw, exclusive, lr_share, train

STEPS = 6
RUN = """
import json, sys, torch
torch.set_num_threads(1)
from kepo.config import from_mapping
from kepo.train import train
sys.exit(train(from_mapping(json.load(open(sys.argv[1])), "test")))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_digits(root / "data", train=6, test=1, seed=0)
    for size in ("student", "teacher"):
        build_tiny(root / size, size=size, seed=1)
    return root


def config_of(made, run_dir, **settings):
    base = Config(
        student=str(made / "student"),
        teacher=str(made / "teacher"),
        train_data=str(made / "data" / "train"),
        train_modalities=("scanned",),
        eval_data=str(made / "data" / "test"),
        run_dir=str(run_dir),
        steps=STEPS,
        prompts_per_step=2,
        num_generations=2,
        micro_batch=3,
        max_completion_length=5,
        # An untrained model never answers; format and a gate on it open for everything instead.
        gate_reward=None,
        num_hinted=0,
        lr=1e-3,
        save_every=1,
        keep_checkpoints=STEPS,
    )
    return replace(base, **settings)


def start(config, tmp_path):
    record = tmp_path / "config.json"
    record.write_text(json.dumps(dataclasses.asdict(config)))
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    return subprocess.Popen([sys.executable, "-c", RUN, str(record)], env=environment)


def wait_for_step(run_dir, step, process):
    for _ in range(1200):
        if any(r["step"] >= step for r in read_metrics(Path(run_dir) / "metrics.jsonl")):
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never reached")


def final(run_dir):
    folder = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    tensors = load_file(folder / "policy" / "model.safetensors")
    return tensors | load_file(folder / "optimizer.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    assert start(config_of(made, run_dir), run_dir).wait() == 0
    return run_dir


def test_a_run_writes_what_it_promises(uninterrupted, made):
    records = read_metrics(uninterrupted / "metrics.jsonl")
    steps = [r for r in records if "reward/mean" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    for key in (
        "gate/rate",
        "rescue/rate",
        "distill/divergence",
        "policy/entropy",
        "loss/distill",
        "time/rollout",
        "time/update",
        "time/teacher",
    ):
        assert all(key in r for r in steps), key
    assert all(r["distill/divergence"] > 0 and r["tokens/teacher"] > 0 for r in steps)
    assert [r["step"] for r in records if "eval" in r] == [0, STEPS]
    assert (uninterrupted / "curves.png").stat().st_size > 10_000
    before = load_file(made / "student" / "model.safetensors")
    after = final(uninterrupted)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # It learns: every gate is open, so the student must move towards the teacher.
    assert steps[-1]["distill/divergence"] < steps[0]["distill/divergence"]


def test_kill_and_resume_ends_in_the_same_bits(uninterrupted, made, tmp_path):
    run_dir = tmp_path / "run"
    config = config_of(made, run_dir, save_every=2)
    process = start(config, tmp_path)
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert killed_at < STEPS, "killed too late to test anything"
    assert start(config, tmp_path).wait() == 0
    resumed, whole = final(run_dir), final(uninterrupted)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    def without_times(folder):
        return [
            {key: value for key, value in r.items() if not key.startswith("time/")}
            for r in read_metrics(folder / "metrics.jsonl")
        ]

    assert without_times(run_dir) == without_times(uninterrupted)


def test_sigterm_saves_then_ends(made, tmp_path):
    run_dir = tmp_path / "run"
    process = start(config_of(made, run_dir, save_every=1000, steps=1000), tmp_path)
    wait_for_step(run_dir, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    step = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step-00000000", f"step-{step:08d}"]


def test_other_settings_do_not_resume(uninterrupted, made):
    with pytest.raises(KepoConfigError, match=r"lr: 0\.001 -> 0\.01"):
        train(config_of(made, uninterrupted, lr=0.01))


def test_two_runs_cannot_share_a_folder(made, tmp_path):
    with exclusive(tmp_path), pytest.raises(KepoConfigError, match="in use by another process"):
        train(config_of(made, tmp_path))


def test_plain_grpo_runs_without_a_teacher(made, tmp_path):
    settings = dict(teacher=None, distill_coef=0.0, gate_reward=None, kl_coef=0.1, steps=1)
    assert train(config_of(made, tmp_path, eval_data=None, **settings)) == 0
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["tokens/teacher"] == 0 and record["policy/kl"] == pytest.approx(0.0, abs=1e-6)


def test_questions_come_round_in_epochs_and_depend_on_the_step_alone(made, tmp_path):
    config = config_of(made, tmp_path, prompts_per_step=4)
    examples = list(range(6))
    steps = [draw(examples, config, step) for step in range(1, 7)]
    seen = [q for step in steps for q in step]
    for epoch in range(4):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == examples
    assert seen[:6] != seen[6:12]
    assert draw(examples, config, 5) == steps[4]


def test_metrics_of_steps_to_be_repeated_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, resume_step=-1)
    for step in (0, 1, 2, 3):
        log.write(step, {"x": step})
    with path.open("a") as file:
        file.write('{"step": 4, "x"')  # cut short by a kill
    MetricsLog(path, resume_step=2).write(3, {"x": 30})
    assert read_metrics(path) == [{"step": s, "x": x} for s, x in ((0, 0), (1, 1), (2, 2), (3, 30))]


def test_learning_rate_rises_then_falls_in_a_line():
    config = Config(steps=10, warmup_steps=2, lr_end=0.2)
    shares = [lr_share(step, config) for step in (1, 2, 6, 10)]
    assert shares == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert lr_share(7, Config(steps=10)) == 1.0
