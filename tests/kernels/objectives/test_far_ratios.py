"""Policies that have drifted apart by more than exp can take: the bound of 20 nats."""

import math

import pytest
import torch
from checks import make_problem
from loss_calls import arguments, assert_right, fused

import kepo_kernels
from kepo_kernels import reference, weights
from kepo_kernels.objectives import policy

LARGEST = math.exp(20.0)
FAR = (20.5, 60.0, 88.8, 150.0, 3e38)
POLICIES = ("clip", "cispo", "sapo", "reinforce")


def test_one_bound():
    assert policy.LARGEST_LOG_RATIO == weights.LARGEST_LOG_RATIO == 20.0
    assert reference.LARGEST_LOG_RATIO == 20.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_k3_by_hand(dtype):
    """The value of 20 nats, and no pull: neither back to the reference nor away from it."""
    for estimate in (policy._k3, lambda d: reference.kl_estimate(-d, torch.zeros_like(d))):
        far = torch.tensor(FAR, dtype=dtype, requires_grad=True)
        values = estimate(far)
        (gradient,) = torch.autograd.grad(values.sum(), far)
        assert values.tolist() == pytest.approx([LARGEST - 21.0] * len(FAR), rel=1e-6)
        assert gradient.tolist() == [0.0] * len(FAR)
        below = torch.tensor([-21.0, -150.0], dtype=dtype, requires_grad=True)
        values = estimate(below)
        (gradient,) = torch.autograd.grad(values.sum(), below)
        assert values.tolist() == pytest.approx([20.0, 149.0], rel=1e-6)
        assert gradient.tolist() == pytest.approx([-1.0, -1.0], abs=1e-8)


def test_up_to_the_bound_nothing_changes():
    d = torch.cat((torch.linspace(-150.0, 20.0, 4001), torch.tensor([20.0])))
    assert torch.equal(policy._k3(d), d.expm1() - d)
    assert torch.equal(policy._ratio(d), d.exp())
    assert policy._ratio(torch.tensor(20.0).nextafter(torch.tensor(30.0))) == policy._ratio(d[-1:])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("policy_loss", POLICIES)
@pytest.mark.parametrize("far", [60.0, 150.0])
def test_far_ratios(policy_loss, level, far):
    """Advantages of either sign and 0, a penalty whose k3 is beyond the bound as well."""
    problem = make_problem(3, 4)
    problem.advantages.copy_(torch.tensor([1.5, 0.0, -2.0]))
    call = arguments(
        "grpo",
        problem,
        old_logprobs=problem.old_logprobs - far,
        ref_logprobs=problem.ref_logprobs + far * (torch.arange(4) < 2),
        kl_coef=1e-3,
        policy_loss=policy_loss,
        importance_level=level,
        epsilon_high=0.3,
    )
    assert_right("grpo", call)
    unbounded = fused("grpo", call | {"sampler_weights": torch.tensor([0.0, 0.0, 1.0])})
    near = fused("grpo", call | {"advantages": torch.zeros(3)})
    # A negative advantage under the clip: the value of e^20, and nothing sent back.
    if policy_loss == "clip":
        assert unbounded["loss"] - near["loss"] == pytest.approx(2.0 * LARGEST / 3, rel=1e-5)
        assert torch.equal(unbounded["hidden"], near["hidden"])


def test_a_loose_clip_ends_there_too():
    """epsilon_high and delta above e^20."""
    call = arguments("grpo", make_problem(3, 4), reduction="sum")
    call |= {"old_logprobs": torch.full((3, 4), -200.0), "epsilon_high": 1e12}
    for advantage in (1.0, -1.0):
        call["advantages"] = torch.full((3,), advantage)
        for more in ({}, {"delta": 1e13}, {"policy_loss": "cispo"}):
            found = fused("grpo", call | more)
            assert all(x.isfinite().all() for x in found.values())
            if "policy_loss" not in more:
                assert found["loss"] == pytest.approx(-12 * advantage * LARGEST, rel=1e-5)
                assert not found["hidden"].any()


def test_a_loss_of_ones_own_is_given_the_log_ratio_as_it_is():
    seen = []

    def own(logprobs, log_ratio, advantages):
        seen.append(log_ratio.detach())
        return log_ratio.square() * advantages

    call = arguments("grpo", make_problem(3, 4), old_logprobs=torch.full((3, 4), -150.0))
    fused("grpo", call | {"policy_loss": own})
    assert torch.cat(seen).min() > 100.0


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_sampler_weights_are_finite(mode):
    """Also without an upper bound of the caller's, and where a long sequence sums them up."""
    mask = torch.ones(2, 500, dtype=torch.bool)
    old, sampler = torch.full((2, 500), -1.0), torch.full((2, 500), -3.0)
    old[1] = -4.0
    by_sequence = kepo_kernels.sampler_weights(
        old, sampler, mask, level="sequence", mode=mode, high=None
    )
    assert by_sequence.tolist() == pytest.approx([LARGEST, math.exp(-500.0)], rel=1e-12)
    sampler[0] = -900.0
    by_token = kepo_kernels.sampler_weights(old, sampler, mask, mode=mode, high=None)
    assert by_token[0].tolist() == pytest.approx([LARGEST] * 500, rel=1e-12)
    assert by_token[1].tolist() == pytest.approx([math.exp(-1.0)] * 500, rel=1e-12)
