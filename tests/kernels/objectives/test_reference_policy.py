"""The oracle's policy terms against arithmetic, torch's own functions and finite differences."""

import math

import pytest
import torch
from checks import Problem, assert_close_to_oracle, make_problem

from kepo_kernels import reference

FLOAT64 = torch.float64
TIGHT = {"eps": 1e-5, "atol": 1e-8, "rtol": 1e-6}  # gradcheck's defaults let 1e-5 pass for 0
RATIOS = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 4.0], dtype=FLOAT64)
OLD = -1.5


def value_and_gradient(policy_loss, advantage, **settings):
    """Of one token at each of the ratios; the gradient is that of its log-probability."""
    old = torch.full_like(RATIOS, OLD)
    logprobs = (old + RATIOS.log()).requires_grad_()
    advantages = torch.full_like(RATIOS, advantage)
    loss = reference.policy_term(policy_loss, logprobs, logprobs - old, advantages, **settings)
    loss.sum().backward()
    return loss.tolist(), logprobs.grad.tolist()


@pytest.mark.parametrize(
    ("advantage", "delta", "losses", "gradients"),
    [
        # ratio            0.5   0.9   1.0   1.1   1.5   4.0, clipped to [0.8, 1.3]
        (2.0, None, (-1.0, -1.8, -2.0, -2.2, -2.6, -2.6), (-1.0, -1.8, -2.0, -2.2, 0.0, 0.0)),
        (-2.0, None, (1.6, 1.8, 2.0, 2.2, 3.0, 8.0), (0.0, 1.8, 2.0, 2.2, 3.0, 8.0)),
        (2.0, 3.0, (-1.0, -1.8, -2.0, -2.2, -2.6, -2.6), (-1.0, -1.8, -2.0, -2.2, 0.0, 0.0)),
        (-2.0, 3.0, (1.6, 1.8, 2.0, 2.2, 3.0, 6.0), (0.0, 1.8, 2.0, 2.2, 3.0, 0.0)),
    ],
)
def test_clip_by_hand(advantage, delta, losses, gradients):
    bounds = {"epsilon_low": 0.2, "epsilon_high": 0.3, "delta": delta}
    actual = value_and_gradient("clip", advantage, **bounds)
    assert actual[0] == pytest.approx(losses, rel=1e-14)
    assert actual[1] == pytest.approx(gradients, rel=1e-14, abs=0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(advantage):
    """The bounded ratio is a constant; the gradient never dies."""
    losses, gradients = value_and_gradient("cispo", advantage, epsilon_high=0.3)
    bounded = [0.5, 0.9, 1.0, 1.1, 1.3, 1.3]
    logprobs = (OLD + RATIOS.log()).tolist()
    assert losses == pytest.approx(
        [-r * advantage * x for r, x in zip(bounded, logprobs, strict=True)], rel=1e-14
    )
    assert gradients == pytest.approx([-r * advantage for r in bounded], rel=1e-14)


@pytest.mark.parametrize(("advantage", "t"), [(2.0, 1.0), (-2.0, 1.05), (0.0, 1.05)])
def test_sapo_by_hand(advantage, t):
    """d/d logprob = -4 r A s (1 - s): at r = 1 it is that of the unclipped ratio, -A."""
    losses, gradients = value_and_gradient("sapo", advantage)
    gates = [1 / (1 + math.exp(-t * (r - 1))) for r in RATIOS.tolist()]
    assert losses == pytest.approx([-4 / t * s * advantage for s in gates], rel=1e-14)
    expected = [
        -4 * r * advantage * s * (1 - s) for r, s in zip(RATIOS.tolist(), gates, strict=True)
    ]
    assert gradients == pytest.approx(expected, rel=1e-13)
    assert gradients[2] == pytest.approx(-advantage)


def test_reinforce_and_a_callable():
    losses, gradients = value_and_gradient("reinforce", 3.0)
    assert losses == pytest.approx((-3.0 * (OLD + RATIOS.log())).tolist())
    assert gradients == pytest.approx([-3.0] * 6)
    losses, gradients = value_and_gradient(lambda logprobs, l, A: A * l.square() - logprobs, 0.5)
    l = RATIOS.log()
    assert losses == pytest.approx((0.5 * l.square() - OLD - l).tolist())
    assert gradients == pytest.approx((l - 1).tolist())


def test_kl_estimates_by_hand():
    """d = ref - logprob = log 2, 0, -log 2."""
    half = math.log(2.0)
    for estimator, values, gradients in (
        ("k1", (-half, 0.0, half), (1.0, 1.0, 1.0)),
        ("k2", (half**2 / 2, 0.0, half**2 / 2), (-half, 0.0, half)),
        ("k3", (1.0 - half, 0.0, half - 0.5), (-1.0, 0.0, 0.5)),
    ):
        logprobs = torch.full((3,), -3.0, dtype=FLOAT64, requires_grad=True)
        ref = torch.tensor([half, 0.0, -half], dtype=FLOAT64) - 3.0
        kl = reference.kl_estimate(logprobs, ref, estimator)
        kl.sum().backward()
        assert kl.tolist() == pytest.approx(values, rel=1e-14)
        assert logprobs.grad.tolist() == pytest.approx(gradients, rel=1e-14)


def test_k1_and_k3_average_to_the_kl():
    """In expectation under the policy itself. k2 has the gradient of a KL, not its value."""
    policy, ref = torch.randn(2, 9, dtype=FLOAT64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(ref, policy, log_target=True, reduction="sum")
    for estimator in ("k1", "k3"):
        actual = (policy.exp() * reference.kl_estimate(policy, ref, estimator)).sum()
        assert_close_to_oracle(actual, expected, name=estimator)


def test_sequence_mean_by_hand():
    values = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=FLOAT64)
    mean = reference.sequence_mean(values, torch.tensor([7, 2, 7, 2]))
    assert mean.tolist() == [1.5, 6.5, 1.5, 6.5]


@pytest.mark.parametrize(
    "estimator, corrected, of",
    [
        ("k1", False, None),
        ("k2", False, "policy from ref"),
        ("k3", False, "ref from policy"),
        ("k1", True, "policy from ref"),
        ("k3", True, "policy from ref"),
    ],
)
def test_the_gradient_of_an_estimate_in_expectation_is_as_the_docstring_says(
    estimator, corrected, of
):
    """Summed over a whole vocabulary, with the samples' probabilities as constants."""
    made = torch.Generator().manual_seed(0)
    logits, ref = torch.randn((2, 9), generator=made, dtype=torch.float64)
    logits.requires_grad_()
    q, p = logits.log_softmax(-1), ref.log_softmax(-1)
    estimate = reference.kl_estimate(q, p, estimator)
    if corrected:
        estimate = (q - q.detach()).exp() * estimate
    (found,) = torch.autograd.grad((q.detach().exp() * estimate).sum(), logits, retain_graph=True)
    divergences = {
        "policy from ref": (q.exp() * (q - p)).sum(),
        "ref from policy": (p.exp() * (p - q)).sum(),
    }
    truths = {
        name: torch.autograd.grad(d, logits, retain_graph=True)[0]
        for name, d in divergences.items()
    }
    if of is None:
        assert found.abs().max() < 1e-12 < truths["policy from ref"].abs().max()
    else:
        torch.testing.assert_close(found, truths.pop(of))
        [other] = truths.values()
        assert not torch.allclose(found, other, rtol=0.1)  # the two can be told apart


def test_unknown_names_are_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="policy_loss 'ppo' is not clip"):
        reference.policy_term("ppo", x, x, x)
    with pytest.raises(ValueError, match="kl_estimator 'k4' is not k1"):
        reference.kl_estimate(x, x, "k4")
    problem = tiny()
    with pytest.raises(ValueError, match="importance_level 'word' is not token"):
        reference.grpo_loss(*required(problem), importance_level="word")


# ------------------------------------------------------------------------------- whole losses


def tiny() -> Problem:
    return make_problem(3, 4, hidden=3, vocab=6, teacher_hidden=5, dtype=FLOAT64)


def required(x: Problem):
    return x.hidden, x.lm_head, x.targets, x.advantages


def test_sequence_level_is_the_clipped_geometric_mean_of_each_sequence():
    """GSPO token by token: one ratio a sequence, of its tokens with weight only."""
    x = tiny()
    weights = torch.rand(3, 4, dtype=FLOAT64) * x.completion_mask
    weights[2, 1] = 0.0
    expected = 0.0
    for i in range(3):
        tokens = weights[i].nonzero().flatten().tolist()
        log_ratio = 0.0
        for t in tokens:
            log_q = (x.lm_head @ x.hidden[i, t]).log_softmax(-1)
            log_ratio += (log_q[x.targets[i, t]] - x.old_logprobs[i, t]) / len(tokens)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - 0.02, 1 + 0.03)
        for t in tokens:
            surrogate = min(ratio * x.advantages[i], clipped * x.advantages[i])
            expected -= weights[i, t] * surrogate
    actual = reference.grpo_loss(
        *required(x),
        weights=weights,
        old_logprobs=x.old_logprobs,
        importance_level="sequence",
        epsilon_low=0.02,
        epsilon_high=0.03,
    )
    assert_close_to_oracle(actual, expected, name="loss")


def test_sequence_level_of_flat_tokens_is_token_level():
    x = tiny()
    flat = x.hidden.flatten(0, 1), x.lm_head, x.targets.flatten(), x.advantages.repeat(4)
    old = x.old_logprobs.flatten()
    sequence, token = (
        reference.grpo_loss(*flat, old_logprobs=old, importance_level=level)
        for level in ("sequence", "token")
    )
    assert torch.equal(sequence, token)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_sampler_weights_scale_the_policy_term_alone(per):
    """Penalty and bonus are not corrected."""
    x = tiny()
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=FLOAT64)
    if per == "token":
        weights = weights.unsqueeze(-1) * torch.rand(3, 4, dtype=FLOAT64)
    extra = {"ref_logprobs": x.ref_logprobs, "kl_coef": 0.3, "entropy_coef": 0.2}
    call = {"old_logprobs": x.old_logprobs, "policy_loss": "sapo", "reduction": "sum"}
    actual = reference.grpo_loss(*required(x), **call, **extra, sampler_weights=weights)
    nothing = reference.grpo_loss(x.hidden, x.lm_head, x.targets, x.advantages * 0, **call, **extra)
    scaled = weights if per == "token" else weights.unsqueeze(-1).expand(3, 4)
    policy = reference.grpo_loss(*required(x), **call | {"weights": scaled})
    assert_close_to_oracle(actual, policy + nothing, name="loss")


def test_on_policy_loss_is_minus_the_advantage_with_its_gradient():
    x = tiny()
    hidden = x.hidden.clone().requires_grad_()
    settings = {"reduction": "token_mean", "policy_loss": "clip"}
    loss = reference.grpo_loss(hidden, *required(x)[1:], **settings)
    assert_close_to_oracle(loss, -x.advantages.mean(), name="loss")
    actual = torch.autograd.grad(loss, hidden)[0]
    plain = reference.grpo_loss(hidden, *required(x)[1:], **settings | {"policy_loss": "reinforce"})
    assert_close_to_oracle(actual, torch.autograd.grad(plain, hidden)[0], name="gradient")


def test_kepo_passes_everything_on():
    """The sum of both losses, each with its own weights; no option of either is lost on the way."""
    x = tiny()
    policy = {
        "old_logprobs": x.old_logprobs,
        "ref_logprobs": x.ref_logprobs,
        "kl_coef": 0.3,
        "kl_estimator": "k2",
        "entropy_coef": 0.1,
        "policy_loss": "sapo",
        "importance_level": "sequence",
        "sapo_temperature_pos": 1.5,
        "sapo_temperature_neg": 0.5,
        "sampler_weights": torch.rand(3, dtype=FLOAT64),
    }
    weights, distill = torch.rand(2, 3, 4, dtype=FLOAT64)
    teacher = x.teacher_hidden, x.teacher_lm_head
    kd = {"beta": 0.1, "teacher_temperature": 2.0, "teacher_bias": x.teacher_bias}
    common = {"completion_mask": x.completion_mask, "bias": x.bias, "temperature": 0.7}
    separate = reference.grpo_loss(*required(x), weights=weights, **policy, **common)
    separate = separate + 3.0 * reference.gated_kd_loss(
        *required(x)[:2], *teacher, gate=x.gate, weights=distill, **kd, **common
    )
    joint = reference.kepo_loss(
        *required(x),
        *teacher,
        gate=x.gate,
        policy_weights=weights,
        distill_weights=distill,
        distill_coef=3.0,
        **policy,
        **kd,
        **common,
    )
    assert_close_to_oracle(joint, separate, name="loss")


@pytest.mark.parametrize("importance_level", ["token", "sequence"])
@pytest.mark.parametrize("policy_loss", ["clip", "sapo", "reinforce"])
def test_gradcheck(policy_loss, importance_level):
    """Not cispo, whose ratio is a constant by definition."""
    x = tiny()

    def grpo(hidden, lm_head):
        return reference.grpo_loss(
            hidden,
            lm_head,
            x.targets,
            x.advantages,
            completion_mask=x.completion_mask,
            old_logprobs=x.old_logprobs,
            ref_logprobs=x.ref_logprobs,
            kl_coef=0.3,
            kl_estimator="k2",
            delta=1.6,
            policy_loss=policy_loss,
            importance_level=importance_level,
        )

    inputs = [t.clone().requires_grad_() for t in (x.hidden, x.lm_head)]
    assert torch.autograd.gradcheck(grpo, inputs, **TIGHT)
