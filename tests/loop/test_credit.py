"""Advantages and the gate, against numbers worked out by hand."""

import pytest
import torch

from kepo.credit import group_advantages, quality_gate


def test_advantages_by_hand():
    # mean 1, deviations (-1, 0, 1), unbiased std 1
    rewards = torch.tensor([[0.0, 1.0, 2.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0]]) / 1.0001
    torch.testing.assert_close(group_advantages(rewards), expected)


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [5.0, 9.0, 7.0]])
    together = group_advantages(rewards)
    assert torch.equal(together[:1], group_advantages(rewards[:1]))
    assert torch.equal(together[1:], group_advantages(rewards[1:]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e8])
def test_equal_rewards_give_exactly_zero(value):
    assert torch.equal(group_advantages(torch.full((2, 7), value)), torch.zeros(2, 7))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_advantages_need_groups(shape):
    with pytest.raises(ValueError, match="shape"):
        group_advantages(torch.zeros(shape))


def test_gate_opens_at_the_threshold():
    quality = torch.tensor([0.0, 0.999, 1.0, 2.0])
    assert quality_gate(quality, 1.0).tolist() == [False, False, True, True]
    assert quality_gate(quality, None).all()
