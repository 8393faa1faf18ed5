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
import weakref
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from safetensors.torch import load_file
from small import config_of, run_rigged

from kepo import loop as train_module
from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.errors import KepoConfigError, KepoError
from kepo.evaluation.answers import greedy_scores
from kepo.loop import lr_share, train
from kepo.models.vlm import VLM
from kepo.rollout import hints as hints_module
from kepo.rollout.questions import draw
from kepo.run import milestones
from kepo.run import open as opening
from kepo.run.lock import exclusive
from kepo.run.metrics import read_metrics

STEPS = 6
RUN = """
import json, sys
from small import run_rigged
sys.exit(run_rigged(json.load(open(sys.argv[1]))))
"""


def whole_config(made, run_dir, **settings):
    """Everything at once: hints, the dataset's answers, exchanged questions, two iterations."""
    everything = dict(
        eval_data=str(made / "data" / "test"),
        steps=STEPS,
        prompts_per_step=3,
        num_iterations=2,
        data_fraction=0.4,
        dynamic_sampling=1,
        gate_reward=None,
        max_attempts=3,
        hinted_correction="truncate",
        keep_checkpoints=STEPS,
        log_completions_every=2,
        lr=2e-4,
        seed=2,  # one in which groups are rescued and exchanged
    )
    return config_of(made, run_dir, **{**everything, **settings})


def start(config, tmp_path):
    record = tmp_path / "config.json"
    record.write_text(json.dumps(dataclasses.asdict(config)))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), str(SUPPORT)]))
    return subprocess.Popen([sys.executable, "-c", RUN, str(record)], env=environment)


def wait_for_step(run_dir, step, process):
    for _ in range(4000):  # a process may be slow to start on a busy machine
        if any(r["step"] >= step for r in read_metrics(Path(run_dir) / "metrics.jsonl")):
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never reached")


def final(run_dir, step=STEPS):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "policy" / "model.safetensors")
    return tensors | load_file(folder / "optimizer.safetensors")


def hints_at(run_dir, step):
    state = run_dir / "checkpoints" / f"step-{step:08d}" / "state.json"
    return json.loads(state.read_text())["hints"]


@pytest.fixture(scope="module")
def uninterrupted(made, draw_curves, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:  # here its picture is looked at
        patch.setattr(milestones, "plot_curves", draw_curves)
        assert run_rigged(dataclasses.asdict(whole_config(made, run_dir))) == 0
    return run_dir


def test_a_run_writes_what_it_promises(uninterrupted, made):
    records = read_metrics(uninterrupted / "metrics.jsonl")
    steps = [r for r in records if "reward" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    for key in (
        "kepo/gate_rate",
        "kepo/rescue_rate",
        "kepo/divergence",
        "entropy",
        "kepo/distill_loss",
        "time/rollout",
        "time/update",
        "time/teacher",
    ):
        assert all(key in r for r in steps), key
    assert all(r["kepo/divergence"] > 0 and r["kepo/teacher_tokens"] > 0 for r in steps)
    assert [r["step"] for r in records if "eval" in r] == [0, STEPS]
    assert (uninterrupted / "curves.png").stat().st_size > 10_000
    before = load_file(made / "student" / "model.safetensors")
    after = final(uninterrupted)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # It learns: every gate is open, so the student must move towards the teacher.
    assert steps[-1]["kepo/divergence"] < steps[0]["kepo/divergence"]
    # And every part was there.
    for key in (
        "hint_groups",
        "hint_accepted",
        "hinted_rate",
        "data_completions",
        "resampled_groups",
    ):
        assert sum(r[f"kepo/{key}"] for r in steps) > 0, key
    assert sum(r["kepo/data_completions"] for r in steps) == int(0.4 * 3 * STEPS + 1e-9)


def test_completions_are_written_down(uninterrupted, made):
    lines = read_metrics(uninterrupted / "completions.jsonl")
    assert sorted({r["step"] for r in lines}) == [1, 2, 4, 6]
    for r in lines:
        assert set(r) == {
            *("step", "prompt", "images", "hint", "completion", "answer", "rewards"),
            *("teacher_hint", "advantage", "gate", "truncated", "from_data"),
        }
        assert Path(r["images"][0]).is_file() and "Hint:" not in r["prompt"]
        assert r["gate"] == 1.0 and set(r["rewards"]) == {"accuracy", "format"}
    assert {r["from_data"] for r in lines} == {bool(r["hint"]) for r in lines} == {False, True}
    assert all(r["advantage"] == 1.0 and r["hint"] is None for r in lines if r["from_data"])
    assert all(r["rewards"]["accuracy"] == 1.0 and not r["truncated"] for r in lines if r["hint"])


def test_kill_and_resume_ends_in_the_same_bits(uninterrupted, made, tmp_path):
    run_dir = tmp_path / "run"
    config = whole_config(made, run_dir, save_every=2)
    process = start(config, tmp_path)
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert killed_at < STEPS, "killed too late to test anything"
    assert run_rigged(dataclasses.asdict(config)) == 0
    resumed, whole = final(run_dir), final(uninterrupted)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert hints_at(run_dir, STEPS) == hints_at(uninterrupted, STEPS) != {}

    def without_machine(folder):
        return [
            {k: v for k, v in r.items() if not k.startswith(("time/", "step_time", "mem/"))}
            for r in read_metrics(folder / "metrics.jsonl")
        ]

    assert without_machine(run_dir) == without_machine(uninterrupted)
    lines = (run_dir / "completions.jsonl").read_text()
    assert lines == (uninterrupted / "completions.jsonl").read_text()


def test_sigterm_saves_then_ends(made, tmp_path):
    run_dir = tmp_path / "run"
    config = config_of(made, run_dir, "grpo", save_every=1000, steps=1000)
    process = start(config, tmp_path)
    wait_for_step(run_dir, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 143
    step = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step-00000000", f"step-{step:08d}"]


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(made, tmp_path, monkeypatch):
    """A signal in the last step ends the run before its final evaluation; resuming brings it."""
    config = config_of(made, tmp_path, "grpo", eval_data=str(made / "data" / "test"), steps=1)
    whole = train_module.step_metrics

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(train_module, "step_metrics", interrupted)
    assert train(config).exit_code == 143
    monkeypatch.setattr(train_module, "step_metrics", whole)
    for _ in range(2):  # once, and not again
        assert train(config).exit_code == 0
        records = read_metrics(tmp_path / "metrics.jsonl")
        assert [r["step"] for r in records if "eval" in r] == [0, 1]
        assert [r["step"] for r in records if "reward" in r] == [1]


def test_other_settings_do_not_resume(uninterrupted, made):
    with pytest.raises(KepoConfigError, match=r"lr: 0\.0002 -> 0\.01"):
        train(whole_config(made, uninterrupted, lr=0.01))


def test_two_runs_cannot_share_a_folder(made, tmp_path):
    with exclusive(tmp_path), pytest.raises(KepoConfigError, match="in use by another process"):
        train(config_of(made, tmp_path))


def test_plain_grpo_runs_without_a_teacher(made, tmp_path):
    assert train(config_of(made, tmp_path, "grpo", kl_coef=0.1, steps=1)).exit_code == 0
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["kepo/teacher_tokens"] == 0 and record["kl"] == pytest.approx(0.0, abs=1e-6)


def test_hints_survive_a_checkpoint_and_are_not_written_twice(made, tmp_path, monkeypatch):
    """Six questions in three steps: from the fourth on, in a resumed run, all hints are known."""
    written = []

    def write(teacher, examples, task, config):
        written.extend(example.id for example in examples)
        return [hints_module.WrittenHint(f"look at {e.id}", 4) for e in examples]

    shown = []
    whole_sample = hints_module.sample

    def sample(*arguments, hints, **settings):
        shown.extend(hints)
        return whole_sample(*arguments, hints=hints, **settings)

    monkeypatch.setattr(hints_module, "write_hints", write)
    monkeypatch.setattr(hints_module, "sample", sample)
    settings = dict(distill_coef=0.0, gate_reward=None, max_attempts=1)  # nobody ever succeeds
    assert train(config_of(made, tmp_path, steps=3, **settings)).exit_code == 0
    assert len(written) == len(set(written)) == 6
    assert hints_at(tmp_path, 3) == {name: f"look at {name}" for name in written}
    shown.clear()
    assert train(config_of(made, tmp_path, steps=4, **settings)).exit_code == 0
    config = config_of(made, tmp_path)
    examples = load_omnimedvqa(config.train_data, modalities=config.train_modalities)
    assert shown == [f"look at {example.id}" for example in draw(examples, config, 4)]
    assert len(written) == 6
    assert [r["kepo/hints_written"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        2,
        2,
        2,
        0,
    ]


def test_the_teacher_is_asked_once_however_many_iterations_follow(made, tmp_path, monkeypatch):
    """And the reference; both before the first update."""
    asked = []
    states = VLM.completion_states

    def spied(vlm, prompts, ids, mask):
        if not any(parameter.requires_grad for parameter in vlm.model.parameters()):
            asked.append((vlm.model.config.text_config.hidden_size, int(mask.sum())))
        return states(vlm, prompts, ids, mask)

    monkeypatch.setattr(VLM, "completion_states", spied)
    found = []
    for iterations in (1, 4):
        run_dir = tmp_path / str(iterations)
        settings = dict(steps=1, num_iterations=iterations, kl_coef=0.1, gate_reward=None)
        assert train(config_of(made, run_dir, **settings)).exit_code == 0
        (record,) = read_metrics(run_dir / "metrics.jsonl")
        found.append((asked.copy(), record["kepo/teacher_tokens"]))
        asked.clear()
    assert found[0] == found[1]
    whose = {size for size, _ in found[0][0]}
    assert len(whose) == 2 and found[0][1] == sum(n for _, n in found[0][0]) / 2 > 0


def test_steps_without_a_finite_gradient_are_skipped_until_it_is_too_many(
    made, tmp_path, monkeypatch
):
    whole = train_module.kepo_step

    def broken(*arguments):
        loss, logprobs = whole(*arguments)
        return loss * torch.nan, logprobs

    monkeypatch.setattr(train_module, "kepo_step", broken)
    config = config_of(made, tmp_path, "grpo", max_skipped_steps=1)
    with pytest.raises(KepoError, match="2 steps in a row had no finite gradient"):
        train(config)
    assert [r["skipped"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    before, after = load_file(made / "student" / "model.safetensors"), final(tmp_path, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_ends_it_at_a_batch(made, tmp_path, monkeypatch, number):
    """However long it would take; a resumed run begins with it."""
    answered = []

    def interrupted(sampler, examples, task, *, stop, **settings):
        def asked():
            answered.append(stop())
            if len(answered) == 2:
                os.kill(os.getpid(), number)
            return stop()

        return greedy_scores(sampler, examples, task, stop=asked, **settings | {"batch_size": 1})

    config = whole_config(made, tmp_path, steps=1)
    monkeypatch.setattr(milestones, "greedy_scores", interrupted)
    assert train(config).exit_code == 128 + number
    assert len(answered) == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    monkeypatch.setattr(milestones, "greedy_scores", greedy_scores)
    assert train(config).exit_code == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "eval" in r] == [0, 1]


def test_a_signal_while_models_are_read_ends_the_run_before_it_begins(made, tmp_path, monkeypatch):
    whole = opening.load_sampler

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return whole(*arguments)

    monkeypatch.setattr(opening, "load_sampler", interrupted)
    assert train(config_of(made, tmp_path, "grpo", steps=1)).exit_code == 128 + signal.SIGUSR1
    assert not (tmp_path / "checkpoints").exists()


def test_learning_rate_rises_then_falls_in_a_line():
    config = Config(steps=10, warmup_steps=2, lr_end=0.2)
    shares = [lr_share(step, config) for step in (1, 2, 6, 10)]
    assert shares == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert lr_share(7, Config(steps=10)) == 1.0
    assert lr_share(7, Config(steps=10, lr_end=1.0)) == 1.0  # as it stands in older checkpoints


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"lr_schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"lr_schedule": "linear"}, [0.5, 1.0, 0.75, 0.5, 0.0]),
        ({"lr_schedule": "linear", "lr_end": 0.2}, [0.5, 1.0, 0.8, 0.6, 0.2]),
        ({"lr_schedule": "cosine"}, [0.5, 1.0, 0.8535533906, 0.5, 0.0]),
        ({"lr_schedule": "cosine", "lr_end": 0.2}, [0.5, 1.0, 0.8828427125, 0.6, 0.2]),
        ({"lr_schedule": "cosine", "lr_end": 1.0}, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_goes_by_its_schedule(settings, shares):
    config = Config(steps=10, warmup_steps=2, **settings)
    assert [lr_share(step, config) for step in (1, 2, 4, 6, 10)] == pytest.approx(shares)


def test_the_cosine_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 20)
    config = Config(steps=20, warmup_steps=3, lr_schedule="cosine")
    for step in range(1, 21):
        optimizer.step()
        theirs.step()  # its first step has rate 0, ours the first share of the way
        assert lr_share(step, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


def test_a_learning_rate_that_was_written_otherwise_resumes(tmp_path):
    before = dataclasses.asdict(Config()) | {"lr_end": 1.0}
    del before["lr_schedule"]  # as versions without it wrote it
    opening.refuse_other_config(Config(steps=300), before, tmp_path)
    with pytest.raises(KepoConfigError, match="lr_schedule: 'constant' -> 'cosine'"):
        opening.refuse_other_config(Config(lr_schedule="cosine"), before, tmp_path)
    before["lr_end"] = 0.1
    opening.refuse_other_config(Config(lr_end=0.1, lr_schedule="linear"), before, tmp_path)
    with pytest.raises(KepoConfigError, match="steps: 200 -> 300"):
        opening.refuse_other_config(Config(lr_end=0.1, steps=300), before, tmp_path)
    with pytest.raises(KepoConfigError, match="lr_schedule: 'linear' -> 'cosine'"):
        opening.refuse_other_config(Config(lr_end=0.1, lr_schedule="cosine"), before, tmp_path)


NEW = {
    "gate_side": "wrong",
    "hint_for": "nobody",
    "distill_tokens": "first_error",
    "data_weight": 0.5,
    "dynamic_reward": "accuracy",
}


@pytest.mark.parametrize("name, other", NEW.items())
def test_a_run_of_before_a_setting_resumes_with_its_default(tmp_path, name, other):
    before = dataclasses.asdict(Config())
    del before[name]
    opening.refuse_other_config(Config(), before, tmp_path)
    with pytest.raises(KepoConfigError, match=f"{name}: .* -> {other!r}"):
        opening.refuse_other_config(Config(**{name: other}), before, tmp_path)


def test_the_optimiser_steps_at_the_learning_rate_of_the_step(made, tmp_path):
    config = config_of(made, tmp_path, "grpo", steps=3, warmup_steps=2, lr_end=0.0, lr=1e-3)
    assert train(config).exit_code == 0
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "metrics.jsonl") if "reward" in r]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.0])


def test_what_the_teacher_said_is_gone_when_the_next_rollout_begins(made, tmp_path, monkeypatch):
    held, seen = [], []
    scoring, exploring = train_module.score, train_module.explore

    def scored(*arguments):
        scores = scoring(*arguments)
        held.extend(weakref.ref(known.teacher_hidden) for known in scores)
        return scores

    def explored(*arguments):
        seen.append([state() is not None for state in held])
        return exploring(*arguments)

    monkeypatch.setattr(train_module, "score", scored)
    monkeypatch.setattr(train_module, "explore", explored)
    settings = dict(steps=2, gate_reward=None, hint_trigger="never", num_iterations=2)
    assert train(config_of(made, tmp_path, **settings)).exit_code == 0
    assert seen[0] == [] and len(seen[1]) > 1 and not any(seen[1])


def test_hints_about_questions_that_have_changed_are_forgotten(tmp_path):
    saved = opening.Saved(tmp_path, {"hints": {"a": "left", "b": None, "c": "right"}}, {"c", "d"})
    assert saved.hints == {"a": "left", "b": None}
