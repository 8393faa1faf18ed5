"""The oracle's heads: softcap, scale and low-rank update against arithmetic and merged weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from checks import Problem, assert_close_to_oracle, make_problem

from kepo_kernels import reference

INF = float("inf")
FLOAT64 = torch.float64
TIGHT = {"eps": 1e-5, "atol": 1e-8, "rtol": 1e-6}  # gradcheck's defaults let 1e-5 pass for 0


def tiny() -> Problem:
    return make_problem(3, 4, hidden=3, vocab=6, teacher_hidden=5, dtype=FLOAT64)


def head(problem: Problem, **settings: object) -> SimpleNamespace:
    """Any object with these four attributes is a head."""
    return SimpleNamespace(
        **{"weight": problem.lm_head, "softcap": None, "logit_scale": 1.0, "lora": None} | settings
    )


def test_head_by_hand():
    """y = 0.5 (x.w + 2 (x.a) b + bias) = 0.5 (1 + 2 * 4 * 0.25 + 1) = 2; the cap is 3."""
    x = torch.tensor([[1.0, 2.0]], dtype=FLOAT64)
    lora = SimpleNamespace(
        a=torch.tensor([[2.0, 1.0]], dtype=FLOAT64),
        b=torch.tensor([[0.25]], dtype=FLOAT64),
        scale=2.0,
    )
    weight, bias = torch.tensor([[-1.0, 1.0]], dtype=FLOAT64), torch.tensor([1.0], dtype=FLOAT64)
    given = SimpleNamespace(weight=weight, softcap=3.0, logit_scale=0.5, lora=lora)
    assert reference.project(x, given, bias).item() == pytest.approx(3 * math.tanh(2 / 3))
    given.softcap = None
    assert reference.project(x, given, bias).item() == pytest.approx(2.0)
    given.lora = None
    assert reference.project(x, given).item() == pytest.approx(0.5)


def test_plain_head_is_its_weight():
    x = tiny()
    expected = reference.gated_kd_loss(x.hidden, x.lm_head, x.teacher_hidden, x.teacher_lm_head)
    teacher = head(x, weight=x.teacher_lm_head)
    actual = reference.gated_kd_loss(x.hidden, head(x), x.teacher_hidden, teacher)
    assert torch.equal(actual, expected)


def test_low_rank_update_is_that_of_the_weight():
    x = tiny()
    a, b = torch.randn(2, 3, dtype=FLOAT64), torch.randn(6, 2, dtype=FLOAT64)
    merged = head(x, weight=x.lm_head + 0.3 * b @ a)
    apart = head(x, lora=SimpleNamespace(a=a, b=b, scale=0.3))
    for options in ({}, {"softcap": 4.0, "logit_scale": 0.25}):
        merged.__dict__.update(options)
        apart.__dict__.update(options)
        expected = reference.project(x.hidden, merged, x.bias)
        assert_close_to_oracle(reference.project(x.hidden, apart, x.bias), expected, name="logits")


def test_softcap_keeps_ruled_out_tokens_out():
    """Value and gradient are those of a head without these tokens; nothing is NaN."""
    x, alive = tiny(), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    losses, gradients = [], []
    for weight, bias in (
        (x.lm_head, x.bias.masked_fill(~alive, -INF)),
        (x.lm_head[alive], x.bias[alive]),
    ):
        leaves = [t.clone().requires_grad_() for t in (x.hidden.flatten(0, 1), weight, bias)]
        logits = reference.project(leaves[0], head(x, weight=leaves[1], softcap=2.0), leaves[2])
        losses.append(reference.token_entropy(logits).sum())
        gradients.append(torch.autograd.grad(losses[-1], leaves))
    assert_close_to_oracle(losses[0], losses[1].detach(), name="entropy")
    assert_close_to_oracle(gradients[0][0], gradients[1][0], name="hidden")
    for name, ruled_out, kept in zip(("weight", "bias"), *[g[1:] for g in gradients], strict=True):
        assert_close_to_oracle(ruled_out[alive], kept, name=name)
        assert not ruled_out[~alive].any(), name


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"softcap": 2.0, "logit_scale": 0.5}])
def test_gradcheck(options):
    """Finite differences agree in hidden, weight, bias and both low-rank factors."""
    x = tiny()
    low_rank = torch.randn(2, 3, dtype=FLOAT64), torch.randn(6, 2, dtype=FLOAT64)
    inputs = [t.clone().requires_grad_() for t in (x.hidden, x.lm_head, x.bias, *low_rank)]

    def kepo(hidden, weight, bias, a, b):
        student = head(x, weight=weight, lora=SimpleNamespace(a=a, b=b, scale=0.7), **options)
        return reference.kepo_loss(
            hidden,
            student,
            x.targets,
            x.advantages,
            x.teacher_hidden,
            head(x, weight=x.teacher_lm_head, softcap=5.0),
            gate=x.gate,
            bias=bias,
            old_logprobs=x.old_logprobs,
            entropy_coef=0.1,
            teacher_temperature=2.0,
        )

    assert torch.autograd.gradcheck(kepo, inputs, **TIGHT)
