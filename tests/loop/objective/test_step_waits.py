"""Between the upload of a micro-batch and the optimiser the host waits for nothing.

Shown on a device that computes on the CPU and refuses to be waited for (tests/support). What
transformers does inside the model's forward is not part of it.
"""

from dataclasses import replace

import pytest
import torch
from pretend_cuda import HostWaits, numbers, on_device, pretend_cuda
from toy import RIGHT, WRONG, TableVLM, group_of

from kepo.config import Config
from kepo.objective import step as step_module
from kepo.objective.batch import collate
from kepo.objective.score import FrozenScores, score
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals

CONFIG = Config(teacher="t", num_generations=2, max_completion_length=64, impl="torch")


class OnAGpu(TableVLM):
    """A scripted model whose states and head are on the pretended device."""

    def completion_states(self, prompts, completion_ids, completion_mask):
        found = super().completion_states(prompts, completion_ids, completion_mask)
        self.states = on_device(found).requires_grad_()
        return self.states * 1.0

    @property
    def head(self):
        if not hasattr(self, "there"):
            self.there = on_device(super().head).requires_grad_()
        return self.there

    @property
    def device(self):
        return torch.device("cuda:0")


def sampled_groups():
    groups = [group_of([RIGHT, WRONG], "a"), group_of([WRONG, RIGHT], "b")]
    for group in groups:
        for place, r in enumerate(group):
            group[place] = replace(r, sampler_logprobs=torch.full((len(r.completion_ids),), -4.0))
    groups[1][1] = replace(groups[1][1], hint="look left")
    return groups


SETTINGS = {
    "plain": {},
    "a penalty": {"kl_coef": 0.1},
    "corrections": {"sampler_correction": "truncate", "hinted_correction": "truncate"},
    "up to the first error": {"distill_tokens": "first_error", "error_threshold": 0.001},
    "guide": {"hinted_correction": "clip"},
    "luffy": {"hinted_correction": "shape"},
    "no teacher": {"teacher": None, "gate_reward": None},
    "sequence ratios": {"importance_level": "sequence"},
}


def gradients(settings, *, later: bool, device: bool):
    """Gradients and totals of a micro-batch whose scores are known."""
    config = replace(CONFIG, **settings)
    batch, totals = collate(sampled_groups(), config), StepTotals()
    teacher = TableVLM(5, hidden=5) if config.teacher else None
    ref = TableVLM(3) if config.kl_coef else None
    (known,) = score(teacher, ref, [batch], config, totals)
    if later:
        shape = batch.completion_mask.shape
        old = torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 5.0
        batch = replace(batch, old_logprobs=old)
    if not device:
        policy = TableVLM(1)
        loss, _ = kepo_step(policy, teacher, batch, known, config, totals)
        loss.backward()
        return [loss.detach(), policy.weights["head"].grad], totals.of_all_ranks()
    with pretend_cuda():
        policy = OnAGpu(1)
        if teacher is not None:
            teacher = OnAGpu(5, hidden=5)
        loss, _ = kepo_step(policy, teacher, batch, known, config, totals)
        loss.backward()
        found = [numbers(loss), numbers(policy.head.grad)]
        totals.unread = {name: numbers(x) for name, x in totals.unread.items()}
    return found, totals.of_all_ranks()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_waits_for_nothing_and_is_right(name, later):
    found, totals = gradients(SETTINGS[name], later=later, device=True)
    truth, expected = gradients(SETTINGS[name], later=later, device=False)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for field in ("policy_loss", "distill_loss", "kl", "entropy", "divergence", "ratio_max"):
        assert getattr(totals, field) == pytest.approx(getattr(expected, field), rel=1e-4, abs=1e-6)
    assert totals.entropy > 0 and totals.tokens == expected.tokens


def test_a_wait_is_seen(monkeypatch):
    real = step_module._add

    def reads(totals, loss, *rest):
        float(loss)
        real(totals, loss, *rest)

    monkeypatch.setattr(step_module, "_add", reads)
    with pytest.raises(HostWaits):
        gradients({}, later=False, device=True)


def test_scores_of_nothing_move_nowhere():
    assert FrozenScores().to(torch.device("cpu")) == FrozenScores()
