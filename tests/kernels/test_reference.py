"""The oracle against what does not come from it: torch's own functions, differences, arithmetic."""

import math

import pytest
import torch
from checks import Problem, assert_close_to_oracle, make_problem, make_row_problem
from torch.nn import functional as F

from kepo_kernels import reference

INF = float("inf")
FLOAT64 = torch.float64
TIGHT = {"eps": 1e-5, "atol": 1e-8, "rtol": 1e-6}  # gradcheck's defaults let 1e-5 pass for 0
TEMPERATURES = (1.0, 0.7)
STDS = (2.0, 12.0)


def softmaxes(std: float, temperature: float, columns: int | None = None):
    problem = make_row_problem(6, 37, 37, std=std, dtype=FLOAT64)
    log_q = (problem.logits[:, :columns] / temperature).log_softmax(-1)
    log_p = (problem.teacher[:, :columns] / temperature).log_softmax(-1)
    return problem, log_q, log_p


# ----------------------------------------------------------------------- the three numbers


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("std", STDS)
def test_token_logprob_is_minus_cross_entropy(std, temperature):
    problem, _, _ = softmaxes(std, temperature)
    expected = -F.cross_entropy(problem.logits / temperature, problem.targets, reduction="none")
    actual = reference.token_logprob(problem.logits, problem.targets, temperature)
    assert_close_to_oracle(actual, expected, name="logprob")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("std", STDS)
def test_token_entropy_is_that_of_the_categorical_distribution(std, temperature):
    problem, _, _ = softmaxes(std, temperature)
    expected = torch.distributions.Categorical(logits=problem.logits / temperature).entropy()
    actual = reference.token_entropy(problem.logits, temperature)
    assert_close_to_oracle(actual, expected, name="entropy")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_token_divergence_is_kl_of_pytorch(beta, std, temperature):
    problem, log_q, log_p = softmaxes(std, temperature)

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta == 0.0:
        expected = kl(log_p, log_q)
    elif beta == 1.0:
        expected = kl(log_q, log_p)
    else:
        log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
        expected = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    actual = reference.token_divergence(problem.logits, problem.teacher, beta, temperature)
    assert_close_to_oracle(actual, expected, name="divergence")


def test_token_divergence_by_hand():
    """q = (1/2, 1/2), p = (1/4, 3/4). With beta = 1/2, m = (3/8, 5/8)."""
    logits = torch.tensor([[0.5, 0.5]], dtype=FLOAT64).log()
    teacher = torch.tensor([[0.25, 0.75]], dtype=FLOAT64).log()
    log = math.log
    expected = {
        0.0: 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5),
        1.0: 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75),
        0.5: 0.5 * (0.25 * log(0.25 / 0.375) + 0.75 * log(0.75 / 0.625))
        + 0.5 * (0.5 * log(0.5 / 0.375) + 0.5 * log(0.5 / 0.625)),
    }
    for beta, value in expected.items():
        actual = reference.token_divergence(logits, teacher, beta)
        assert actual.item() == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_token_divergence_reads_the_shared_columns(beta):
    wide, narrow = make_row_problem(4, 37, 29, dtype=FLOAT64), slice(None, 29)
    expected = reference.token_divergence(wide.logits[:, narrow], wide.teacher, beta)
    actual = reference.token_divergence(wide.logits, wide.teacher, beta)
    swapped = reference.token_divergence(wide.teacher, wide.logits, 1.0 - beta)
    assert_close_to_oracle(actual, expected, name="student wider")
    assert_close_to_oracle(swapped, expected, name="teacher wider, roles exchanged")


def test_teacher_temperature():
    """It divides the teacher's logits and nothing else; None is the student's."""
    problem = make_row_problem(4, 37, 29, dtype=FLOAT64)
    for beta in (0.0, 0.3, 1.0):
        scaled = reference.token_divergence(problem.logits / 0.7, problem.teacher / 2.0, beta)
        apart = reference.token_divergence(problem.logits, problem.teacher, beta, 0.7, 2.0)
        assert_close_to_oracle(apart, scaled, name="divergence")
        same = reference.token_divergence(problem.logits, problem.teacher, beta, 0.7, 0.7)
        default = reference.token_divergence(problem.logits, problem.teacher, beta, 0.7)
        assert torch.equal(default, same)
        assert not torch.allclose(default, apart, rtol=0.01)
    x = tiny()
    kd = x.hidden, x.lm_head, x.teacher_hidden
    scaled = reference.gated_kd_loss(*kd, x.teacher_lm_head / 2.0)
    apart = reference.gated_kd_loss(*kd, x.teacher_lm_head, teacher_temperature=2.0)
    assert_close_to_oracle(apart, scaled, name="loss")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_masked_columns_count_for_nothing(beta):
    """Columns that are -inf on both sides: value and gradient are those without these columns."""
    problem = make_row_problem(4, 37, 37, dtype=FLOAT64)
    logits, alive = problem.logits, torch.arange(37) % 5 > 0
    masked = [x.masked_fill(~alive, -INF).requires_grad_() for x in (logits, problem.teacher)]
    kept = [x[:, alive].requires_grad_() for x in (logits, problem.teacher)]
    for student, teacher in (masked, kept):
        divergence = reference.token_divergence(student, teacher.detach(), beta)
        (divergence + reference.token_entropy(student)).sum().backward()
    assert_close_to_oracle(masked[0].grad[:, alive], kept[0].grad, name="gradient")
    assert not masked[0].grad[:, ~alive].any()


# --------------------------------------------------------------------------------- reductions

MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("reduction", "gate", "first", "second"),
    [
        # weight of an active token of the first (two tokens) and of the second sequence (three)
        ("token_mean", None, 1 / 5, 1 / 5),
        ("token_mean", [True, False, True], 1 / 2, 0.0),
        ("token_mean", [2.0, 0.5, 1.0], 2 / 5, 0.5 / 5),
        ("token_mean", [False, False, True], 0.0, 0.0),
        ("sequence_mean", None, 1 / 2 / 3, 1 / 3 / 3),
        ("sequence_mean", [True, False, True], 1 / 2 / 3, 0.0),
        ("sequence_mean", [2.0, 0.5, 1.0], 2 / 2 / 3, 0.5 / 3 / 3),
        ("sum", None, 1.0, 1.0),
        ("sum", [0.0, 0.5, 1.0], 0.0, 0.5),
    ],
)
def test_reduction_weights_by_hand(reduction, gate, first, second):
    gate = None if gate is None else torch.tensor(gate)
    weights = reference.reduction_weights(MASK, gate, reduction)
    expected = [[first, first, 0.0], [second] * 3, [0.0] * 3]
    assert weights.tolist() == [pytest.approx(row, rel=1e-15, abs=0) for row in expected]


@pytest.mark.parametrize(
    ("reduction", "weight"), [("token_mean", 1 / 2), ("sequence_mean", 1 / 3), ("sum", 1.0)]
)
def test_reduction_weights_of_flat_tokens_by_hand(reduction, weight):
    weights = reference.reduction_weights(torch.tensor([1, 0, 1]), None, reduction)
    assert weights.tolist() == pytest.approx([weight, 0.0, weight], rel=1e-15, abs=0)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction 'mean' is not token_mean"):
        reference.reduction_weights(MASK, None, "mean")


# ------------------------------------------------------------------------------- whole losses


def tiny(**settings: object) -> Problem:
    return make_problem(3, 4, hidden=3, vocab=6, teacher_hidden=5, dtype=FLOAT64, **settings)


def test_gated_kd_loss_is_the_sum_of_its_tokens():
    x = tiny(teacher_vocab=8)
    expected, count = 0.0, 0
    for i, t in (x.completion_mask & x.gate.unsqueeze(-1)).nonzero().tolist():
        log_q = (x.lm_head @ x.hidden[i, t] + x.bias).div(0.7).log_softmax(-1)
        y = x.teacher_lm_head @ x.teacher_hidden[i, t] + x.teacher_bias
        log_p = y[:6].div(0.7).log_softmax(-1)
        expected += (log_q.exp() * (log_q - log_p)).sum()
        count += 1
    actual = reference.gated_kd_loss(
        x.hidden,
        x.lm_head,
        x.teacher_hidden,
        x.teacher_lm_head,
        gate=x.gate,
        completion_mask=x.completion_mask,
        beta=1.0,
        temperature=0.7,
        bias=x.bias,
        teacher_bias=x.teacher_bias,
    )
    assert 0 < count < x.completion_mask.sum()  # the gate closes something
    assert_close_to_oracle(actual, expected / count, name="loss")


def test_grpo_loss_is_the_sum_of_its_tokens():
    x = tiny()
    expected = 0.0
    for i in range(3):
        tokens = x.completion_mask[i].nonzero().flatten().tolist()
        for t in tokens:
            log_q = (x.lm_head @ x.hidden[i, t]).log_softmax(-1)
            logprob = log_q[x.targets[i, t]]
            ratio = (logprob - x.old_logprobs[i, t]).exp()
            surrogate = min(ratio * x.advantages[i], ratio.clamp(0.9, 1.1) * x.advantages[i])
            d = x.ref_logprobs[i, t] - logprob
            entropy = -(log_q.exp() * log_q).sum()
            term = -surrogate + 0.04 * (d.exp() - d - 1) - 0.01 * entropy
            expected += term / len(tokens) / 3
    actual = reference.grpo_loss(
        x.hidden,
        x.lm_head,
        x.targets,
        x.advantages,
        completion_mask=x.completion_mask,
        old_logprobs=x.old_logprobs,
        ref_logprobs=x.ref_logprobs,
        epsilon_low=0.1,
        epsilon_high=0.1,
        kl_coef=0.04,
        entropy_coef=0.01,
    )
    assert_close_to_oracle(actual, expected, name="loss")


def test_kepo_loss_is_the_sum_of_both():
    x = tiny()
    grpo = reference.grpo_loss(x.hidden, x.lm_head, x.targets, x.advantages, kl_coef=0.0)
    teacher = (x.teacher_hidden, x.teacher_lm_head)
    kd = reference.gated_kd_loss(x.hidden, x.lm_head, *teacher, gate=x.gate, beta=0.1)
    policy = (x.hidden, x.lm_head, x.targets, x.advantages)
    kepo = reference.kepo_loss(*policy, *teacher, gate=x.gate, distill_coef=3.0, beta=0.1)
    assert_close_to_oracle(kepo, grpo + 3.0 * kd, name="loss")


def test_kepo_loss_without_either_part_is_refused():
    x = tiny()
    with pytest.raises(ValueError, match="neither targets nor teacher_hidden is given"):
        reference.kepo_loss(x.hidden, x.lm_head)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("options", ["", "gate", "bias", "gate bias"])
def test_gradcheck(options, temperature):
    """Finite differences agree; `old_logprobs` is given, as the on-policy ratio is detached."""
    x = tiny(temperature=temperature)
    chosen = {name: getattr(x, name) for name in options.split() if name != "bias"}
    settings = {"completion_mask": x.completion_mask, "temperature": temperature}
    inputs = [t.clone().requires_grad_() for t in (x.hidden, x.lm_head)]
    inputs += [x.bias.clone().requires_grad_()] if "bias" in options else []
    teacher = (x.teacher_hidden, x.teacher_lm_head)

    for beta in (0.0, 0.3, 1.0):

        def kd(hidden, head, bias=None, beta=beta):
            return reference.gated_kd_loss(
                hidden, head, *teacher, bias=bias, beta=beta, **settings, **chosen
            )

        assert torch.autograd.gradcheck(kd, inputs, **TIGHT)

    def grpo(hidden, head, bias=None):
        return reference.grpo_loss(
            hidden,
            head,
            x.targets,
            x.advantages,
            bias=bias,
            old_logprobs=x.old_logprobs,
            ref_logprobs=x.ref_logprobs,
            kl_coef=0.1,
            entropy_coef=0.1,
            **settings,
        )

    assert torch.autograd.gradcheck(grpo, inputs, **TIGHT)


def test_inactive_rows_do_not_exist():
    """NaN in rows that are masked or gated reaches neither the loss nor the gradients."""
    x = tiny()
    active = x.completion_mask & x.gate.unsqueeze(-1)
    results = []
    for rest in (0.0, torch.nan):
        hidden = torch.where(active.unsqueeze(-1), x.hidden, rest).requires_grad_()
        head = x.lm_head.clone().requires_grad_()
        loss = reference.gated_kd_loss(
            hidden,
            head,
            torch.where(active.unsqueeze(-1), x.teacher_hidden, rest),
            x.teacher_lm_head,
            gate=x.gate,
            completion_mask=x.completion_mask,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for name, clean, poisoned in zip(("loss", "hidden", "lm_head"), *results, strict=True):
        assert torch.equal(clean, poisoned), name
        assert clean.any(), name
    assert not results[1][1][~active].any()


def test_no_open_gate_gives_exactly_zero():
    x = tiny()
    hidden = x.hidden.clone().requires_grad_()
    loss = reference.gated_kd_loss(
        hidden, x.lm_head, x.teacher_hidden, x.teacher_lm_head, gate=torch.zeros(3)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
