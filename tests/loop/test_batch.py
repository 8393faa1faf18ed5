"""Rollouts to tensors: weights that add up, gates on the right reward, padding that carries
nothing.
"""

from dataclasses import replace

import pytest
import torch
from toy import MALFORMED, RIGHT, WRONG, rollout

from kepo.batch import collate
from kepo.config import Config

CONFIG = Config(teacher="t", num_generations=2, num_hinted=0)
GROUPS = [
    [rollout(RIGHT, "a"), rollout(WRONG, "a")],
    [rollout(MALFORMED, "b"), rollout(RIGHT, "b")],
]


def test_ids_mask_and_padding():
    batch = collate(GROUPS, CONFIG)
    lengths = [len(r.completion_ids) for group in GROUPS for r in group]
    assert batch.completion_mask.sum(-1).tolist() == lengths
    for row, r in enumerate(r for group in GROUPS for r in group):
        assert batch.completion_ids[row][batch.completion_mask[row]].tolist() == (
            r.completion_ids.tolist()
        )
    assert batch.completion_ids[~batch.completion_mask].eq(0).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [True, False, False, True]),
        ({"gate_reward": "format"}, [True, True, False, True]),
        ({"gate_reward": "total", "gate_threshold": 1.0}, [True, True, False, True]),
        ({"gate_reward": "total", "gate_threshold": 2.0}, [True, False, False, True]),
        ({"gate_reward": None}, [True] * 4),
        ({"distill_coef": 0.0}, [False] * 4),
        ({"teacher": None}, [False] * 4),
    ],
)
def test_gate_reads_the_reward_it_is_told_to(settings, expected):
    assert collate(GROUPS, replace(CONFIG, **settings)).gate.tolist() == expected


def test_weights_are_normalised_over_the_whole_step():
    batch = collate(GROUPS, CONFIG)
    opened = batch.completion_mask & batch.gate[:, None]
    # sequence mean: every completion weighs 1/4, shared by its tokens
    torch.testing.assert_close(batch.policy_weights.sum(-1), torch.full((4,), 0.25).double())
    # token mean over the open completions only
    expected = opened.double() / opened.sum()
    torch.testing.assert_close(batch.distill_weights, expected)


def test_micro_batches_are_the_batch_in_pieces():
    batch = collate(GROUPS, CONFIG)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 1]
    assert parts[0].prompts + parts[1].prompts == batch.prompts
    assert sum(float(part.policy_weights.sum()) for part in parts) == pytest.approx(1.0)
    assert sum(float(part.distill_weights.sum()) for part in parts) == pytest.approx(1.0)
    short = batch.split(1)[2]  # the malformed one, four times shorter than the rest
    assert short.completion_ids.shape == (1, len(MALFORMED) + 1)
    assert short.completion_mask.all()


def test_truncated_completions_count_in_the_group_but_carry_no_loss():
    groups = [[rollout(RIGHT), rollout(WRONG, truncated=True)]]
    kept, masked = collate(groups, CONFIG), collate(groups, replace(CONFIG, mask_truncated=True))
    assert torch.equal(kept.advantages, masked.advantages) and kept.advantages[1] < 0
    assert kept.policy_weights[1].any() and not masked.policy_weights[1].any()
    assert not masked.completion_mask[1].any()
