"""Whole runs whose completions vLLM itself samples, on a CPU; see test_vllm_itself.py."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm_models
from small import config_of, rigged

from kepo.digits.dataset import write_digits
from kepo.loop import train
from kepo.rollout import vllm as sampling
from kepo.rollout.vllm import VllmSampler
from kepo.run import milestones
from kepo.run.metrics import read_metrics

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ROUNDING = 2e-5  # nat; both compute in float32, in another order


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_digits(root / "data", train=6, test=2, seed=0)
    vllm_models.build(root / "student", tied=True)
    vllm_models.build(root / "teacher", seed=2)
    return root


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than the steps."""
    monkeypatch.setattr(milestones, "plot_curves", lambda *_, **__: None)


@pytest.fixture
def apart(monkeypatch):
    """A list of how far vLLM's numbers are from the policy's, at every sampling that is not greedy.

    (The run's own metric compares with a law that has placeholders in it, of which an untrained
    model says many.)
    """
    found, sample = [], VllmSampler.sample

    def compared(sampler, prompts, params, seeds=None):
        drawn = sample(sampler, prompts, params, seeds)
        if not params.greedy:
            policy = sampler._weights.__self__
            found.append(vllm_models.apart(policy, prompts, params, drawn))
        return drawn

    monkeypatch.setattr(VllmSampler, "sample", compared)
    return found


def settings(made, run_dir, **changes):
    usual = dict(sampler="vllm", vllm_memory=0.15, steps=3, lr=3e-2, save_every=1, eval_every=1)
    usual |= dict(eval_data=str(made / "data" / "test"), gate_reward=None)
    return config_of(made, run_dir, **(usual | changes))


def steps_of(config):
    with rigged():
        assert train(config).exit_code == 0
    records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return [r for r in records if "reward" in r], records


def test_three_steps_with_an_evaluation_and_the_same_resumed(made, tmp_path, apart):
    whole, records = steps_of(settings(made, tmp_path / "whole"))
    assert [r["step"] for r in whole] == [1, 2, 3]
    assert len(apart) >= 3 and max(apart) < ROUNDING, apart
    assert all(0 < r["sampling/sampling_logp_difference/mean"] < 0.5 for r in whole)
    assert len([r for r in records if "eval_items" in r]) == 4
    part, _ = steps_of(settings(made, tmp_path / "parts", steps=2))
    assert len(part) == 2
    resumed, _ = steps_of(settings(made, tmp_path / "parts"))
    assert [r["step"] for r in resumed] == [1, 2, 3]
    for name in ("reward", "grad_norm", "completions/mean_length"):
        assert [r[name] for r in resumed] == pytest.approx([r[name] for r in whole], rel=1e-3), name


def test_weights_that_are_not_heard_show(made, tmp_path, monkeypatch, apart):
    """The fault: from the second step on vLLM samples with the first one's."""
    load, loaded = sampling.load_weights, []

    def once(model, vllm_config, weights):
        if not loaded:
            loaded.append(load(model, vllm_config, weights))
        return loaded[0]

    monkeypatch.setattr(sampling, "load_weights", once)
    steps_of(settings(made, tmp_path / "stale", eval_every=0, eval_data=None))
    assert apart[0] < ROUNDING and apart[-1] > 100 * ROUNDING
