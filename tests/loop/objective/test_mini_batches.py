"""Several optimiser steps on the completions of one rollout, against the plain formula."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_run
from toy import BARE, MALFORMED, RIGHT, WRONG, TableVLM, group_of, rollout
from toy_run import ToyPolicy, config_of, run, toys, weights, write_dataset

from kepo import loop
from kepo.config import Config
from kepo.objective.batch import Batch, collate
from kepo.objective.step import with_old_logprobs
from kepo.objective.totals import StepTotals
from kepo.run.metrics import read_metrics
from kepo_kernels import reference

CONFIG = Config(teacher="t", num_generations=2, max_completion_length=64, impl="torch")
GROUPS = [
    group_of([RIGHT, WRONG], "a"),
    group_of([MALFORMED, RIGHT], "b"),
    group_of([BARE, RIGHT], "c"),
]
DATA = [rollout(RIGHT, "d")]
REDUCTIONS = [
    dict(policy_reduction=policy, distill_reduction=distillation)
    for policy, distillation in (
        ("sequence_mean", "token_mean"),
        ("token_mean", "sequence_mean"),
        ("dr_grpo", "sum"),
    )
]


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_a_mini_batch_weighs_as_if_it_were_all_of_the_step(reductions):
    config = replace(CONFIG, mini_batches=2, **reductions)
    whole = collate(GROUPS, config, DATA)
    one, other = whole.mini_batches()
    assert [p.text for p in one.prompts] == [r.prompt.text for r in [*GROUPS[0], *GROUPS[2]]]
    assert [p.text for p in other.prompts] == [r.prompt.text for r in [*GROUPS[1], *DATA]]
    alone = replace(config, mini_batches=1)
    for mini, expected in (
        (one, collate([GROUPS[0], GROUPS[2]], alone)),
        (other, collate([GROUPS[1]], alone, DATA)),
    ):
        assert torch.equal(mini.advantages, expected.advantages)
        for name in ("completion_ids", "completion_mask", "policy_weights", "distill_weights"):
            assert torch.equal(getattr(mini, name), getattr(expected, name)), name


def test_advantages_are_those_of_the_whole_step():
    config = replace(CONFIG, mini_batches=3, scale_rewards="batch")
    whole = collate(GROUPS, replace(config, mini_batches=1))
    parts = [mini.advantages for mini in collate(GROUPS, config).mini_batches()]
    assert torch.equal(torch.cat(parts), whole.advantages)


def test_one_mini_batch_is_the_batch_itself():
    batch = collate(GROUPS, CONFIG, DATA)
    [only] = batch.mini_batches()
    assert only is batch and not batch.mini.any()


def test_log_probabilities_from_before_are_the_policy_s_own():
    policy, totals = TableVLM(1), StepTotals()
    batch = collate(GROUPS, CONFIG)
    batch = replace(batch, sampler_logprobs=torch.where(batch.completion_mask, -3.0, torch.nan))
    found, mask = with_old_logprobs(policy, batch, CONFIG, totals), batch.completion_mask
    truth = policy.logprobs(batch).detach()
    torch.testing.assert_close(found.old_logprobs[mask], truth[mask])
    assert not found.old_logprobs.requires_grad
    totals = totals.of_all_ranks()
    assert totals.sampled_tokens == int(mask.sum())
    assert totals.sampler_gap == pytest.approx((truth[mask] + 3.0).abs().sum().item(), rel=1e-5)


# ---- a run, against AdamW on the whole-matrix reference ----

# One of them has tags: of two that share tokens, and have opposite advantages, the gradient of what
# is shared is 0, rounding apart, and AdamW takes a whole step by rounding.
APART = (RIGHT, "quite wrong", "G", "no idea")
SETTINGS = dict(prompts_per_step=4, steps=3, epsilon_low=0.02, epsilon_high=0.03, micro_batch=3)


def trained(folder, monkeypatch, **settings) -> tuple[Config, list[Batch]]:
    """A run's config, and the batches of its steps."""
    batches = []

    def recorded(*arguments):
        batches.append(collate(*arguments))
        return batches[-1]

    data = write_dataset(folder / "data")
    config = replace(config_of(data, folder / "run"), **SETTINGS, **settings)
    with toys(), monkeypatch.context() as patch:
        patch.setattr(loop, "collate", recorded)
        patch.setattr(toy_run, "TEXTS", APART)
        assert run(config).sentence is None
    return config, batches


def by_hand(config: Config, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """What becomes of the weights: every pass over the mini-batches, one after another."""
    policy = ToyPolicy()
    optimizer = torch.optim.AdamW(
        policy.weights.values(), lr=config.lr, weight_decay=config.weight_decay
    )
    for batch in batches:
        old = policy.logprobs(batch).detach()  # of before the first of this step's updates
        for _ in range(config.num_iterations):
            for number in range(config.mini_batches):
                own = batch.mini == number
                states = policy.completion_hidden(
                    [prompt.text for prompt, mine in zip(batch.prompts, own, strict=True) if mine],
                    batch.completion_ids[own],
                    batch.completion_mask[own],
                )
                loss = reference.grpo_loss(
                    states,
                    policy.head,
                    batch.completion_ids[own],
                    batch.advantages[own],
                    completion_mask=batch.completion_mask[own],
                    weights=batch.policy_weights[own],
                    old_logprobs=old[own],
                    epsilon_low=config.epsilon_low,
                    epsilon_high=config.epsilon_high,
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.weights.values(), config.max_grad_norm)
                optimizer.step()
    return {name: weight.detach() for name, weight in policy.weights.items()}


def differing(config: Config, expected: dict[str, torch.Tensor]) -> bool:
    found = weights(Path(config.run_dir), config.steps)
    return any(
        not torch.allclose(found[name], weight, rtol=1e-4, atol=2e-5)
        for name, weight in expected.items()
    )


@pytest.mark.parametrize("settings", [
    dict(mini_batches=1),
    dict(mini_batches=2),
    dict(mini_batches=4, num_iterations=2),
    dict(mini_batches=2, num_iterations=2, policy_reduction="token_mean"),
])  # fmt: skip
def test_a_run_is_what_the_formula_says(tmp_path, monkeypatch, settings):
    config, batches = trained(tmp_path, monkeypatch, **settings)
    assert len(batches) == 3
    assert not differing(config, by_hand(config, batches))


def test_the_old_log_probabilities_of_later_mini_batches_matter(tmp_path, monkeypatch):
    """The fault: each mini-batch meets the policy as it is, and no ratio is ever clipped."""
    monkeypatch.setattr(loop, "with_old_logprobs", lambda policy, micro, *_: micro)
    config, batches = trained(tmp_path, monkeypatch, mini_batches=4)
    assert differing(config, by_hand(config, batches))


def test_a_run_that_is_interrupted_between_steps_goes_on_to_the_same_bits(tmp_path):
    data, settings = write_dataset(tmp_path / "data"), dict(SETTINGS, mini_batches=2)
    with toys():
        assert run(config_of(data, tmp_path / "whole", **settings)).sentence is None
        for steps in (1, 3):
            parts = config_of(data, tmp_path / "parts", **{**settings, "steps": steps})
            assert run(parts).sentence is None
    whole, parts = weights(tmp_path / "whole", 3), weights(tmp_path / "parts", 3)
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())


def test_metrics_are_of_all_mini_batches(tmp_path, monkeypatch):
    """The policy's first pass: its loss is minus the mean of the advantages, as with one."""
    first = {}
    for count in (1, 4):
        folder, settings = tmp_path / str(count), dict(mini_batches=count, lr=1e-12)
        _, batches = trained(folder, monkeypatch, **settings)
        records = read_metrics(folder / "run" / "metrics.jsonl")
        first[count] = next(record for record in records if "reward" in record)
        assert first[count]["kepo/completion_tokens"] == int(batches[0].completion_mask.sum())
    for name in ("kepo/policy_loss", "entropy", "sampling/sampling_logp_difference/mean"):
        assert first[4][name] == pytest.approx(first[1][name], rel=1e-4, abs=1e-6), name
    assert first[4]["clip_ratio/high_mean"] == 0.0
