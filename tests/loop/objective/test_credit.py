"""Advantages, the gate and the weights of hinted tokens, against numbers worked out by hand."""

import pytest
import torch

from kepo.objective.credit import correction_weights, group_advantages, hinted_weights, quality_gate


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


def test_unscaled_advantages_are_the_distance_from_the_mean():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.3]])
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-0.1, -0.1, 0.2]])
    torch.testing.assert_close(group_advantages(rewards, "none"), expected)
    equal = torch.full((1, 7), 0.1)
    assert torch.equal(group_advantages(equal, "none"), torch.zeros(1, 7))


def test_advantages_scaled_by_the_batch():
    # means 1 and 4; the squared distances of all six from their mean, 2.5, sum to 21.5
    rewards = torch.tensor([[0.0, 1.0, 2.0], [5.0, 2.0, 5.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0], [1.0, -2.0, 1.0]]) / ((21.5 / 5) ** 0.5 + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, "batch"), expected)
    equal = torch.tensor([[0.1] * 3, [0.0, 1.0, 0.0]])
    assert torch.equal(group_advantages(equal, "batch")[0], torch.zeros(3))


def test_gate_opens_at_the_threshold():
    quality = torch.tensor([0.0, 0.999, 1.0, 2.0])
    gate = quality_gate(quality, 1.0)
    assert gate.dtype == torch.float32 and gate.tolist() == [0, 0, 1, 1]


def test_the_other_side_of_a_gate_opens_under_the_threshold_where_a_reward_applies():
    quality = torch.tensor([-torch.inf, -1.0, 0.999, 1.0, 2.0])
    gate = quality_gate(quality, 1.0, "wrong")
    assert gate.dtype == torch.float32 and gate.tolist() == [0, 1, 1, 0, 0]


def test_a_gate_without_a_threshold_is_the_quality_where_it_is_positive():
    gate = quality_gate(torch.tensor([-3.0, 0.0, 0.25, 2.0]).double(), None)
    assert gate.dtype == torch.float32 and gate.tolist() == [0, 0, 0.25, 2]


# ---- hinted tokens ----

Q = torch.tensor([[0.9, 0.1, 0.01, 0.5]])  # without the hint
B = torch.tensor([[0.3, 0.2, 0.90, torch.nan]])  # with it; nobody drew the last
HINTED = torch.tensor([[True, True, True, False]])


def test_truncated_weights_are_the_capped_ratio_of_the_two_laws():
    weights = hinted_weights(Q.log(), B.log(), HINTED, "truncate", cap=2.0, gamma=0.1)
    expected = torch.tensor([[2.0, 0.5, 1 / 90, 1.0]])  # 0.9 / 0.3 is capped
    torch.testing.assert_close(weights, expected.double())
    uncapped = hinted_weights(Q.log(), B.log(), HINTED, "truncate", cap=5.0, gamma=0.1)
    torch.testing.assert_close(uncapped[0, 0].item(), 3.0, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("gamma", [0.1, 0.7])
def test_shaped_weights_are_the_gradient_of_the_shaped_probability(gamma):
    logprobs = Q.log().double().requires_grad_()
    q = logprobs.exp()
    (expected,) = torch.autograd.grad((q / (q + gamma)).sum(), logprobs)
    assert expected[0, 1] > Q[0, 1]  # the unlikely are spared: more than q, as a ratio would give
    weights = hinted_weights(logprobs, B.log(), HINTED, "shape", cap=2.0, gamma=gamma)
    assert not weights.requires_grad
    torch.testing.assert_close(weights[HINTED], expected[HINTED])
    assert weights[~HINTED].tolist() == [1.0]


def test_hinted_weights_know_their_corrections():
    with pytest.raises(ValueError, match="correction is 'clip'"):
        hinted_weights(Q.log(), B.log(), HINTED, "clip", cap=2.0, gamma=0.1)


# ---- tokens of another sampler ----


def test_engine_weights_are_the_capped_ratio_of_trainer_to_engine():
    logprobs = Q.log().requires_grad_()
    weights = correction_weights(logprobs, B.log(), torch.tensor([[True] * 4]), cap=2.0)
    assert not weights.requires_grad
    # 0.9 / 0.3 is capped; the last, which nobody drew, weighs 1
    expected = torch.tensor([[2.0, 0.5, 1 / 90, 1.0]]).double()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0.0)
    low = correction_weights(logprobs, B.log(), torch.tensor([[True] * 4]), cap=0.25)
    torch.testing.assert_close(low, torch.tensor([[0.25, 0.25, 1 / 90, 1.0]]).double())


def test_engine_weights_leave_other_tokens_alone():
    own = torch.tensor([[False, True, False, False]])
    weights = correction_weights(Q.log(), B.log(), own, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 1.0, 1.0]]).double())
