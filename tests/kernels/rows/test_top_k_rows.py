"""Rows with a teacher of K tokens, on every back-end, against the fp64 oracle and its tolerance."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import (
    RowProblem,
    assert_close_to_oracle,
    device_of,
    make_row_problem,
    rows_module,
)
from torch import Tensor

from kepo_kernels import TopK, reference
from kepo_kernels.rows import top_k_rows, torch_rows
from kepo_kernels.rows.contract import RowSettings
from kepo_kernels.rows.top_k_rows import TopKRows

ROWS, VOCAB = 7, 37


def teacher_of(problem: RowProblem, count: int) -> TopK:
    """The teacher's most likely; the third row has one fewer, the second none."""
    found = problem.teacher.double().log_softmax(-1).topk(count)
    ids, logprobs = found.indices, found.values.to(torch.float32)
    if count > 1:
        ids[2, 0], logprobs[2, 0] = -1, torch.nan
        ids[1] = -1
    return TopK(ids, logprobs)


def oracle_of(problem: RowProblem, teacher: TopK, settings: RowSettings) -> tuple[Tensor, Tensor]:
    """(3, n) numbers and the gradient on the logits, by definition and autograd."""
    raw = problem.logits.double().clone().requires_grad_()
    alive = raw > -torch.inf
    x = raw
    if settings.softcap:
        capped = settings.softcap * (torch.where(alive, raw, 0.0) / settings.softcap).tanh()
        x = torch.where(alive, capped, -torch.inf)
    x = x / settings.temperature
    logprob = torch.zeros(len(raw), dtype=torch.float64)
    if problem.targets is not None:
        logprob = reference.token_logprob(x, problem.targets)
    divergence = reference.top_k_divergence(
        x, teacher.ids, teacher.logprobs.double(), settings.beta
    )
    numbers = torch.stack((logprob, divergence, reference.token_entropy(x)))
    (gradient,) = torch.autograd.grad((problem.coefficients.double() * numbers).sum(), raw)
    return numbers.detach(), gradient


def judge(impl: str, problem: RowProblem, teacher: TopK, settings: RowSettings) -> None:
    device = device_of(impl)
    logits, coefficients = problem.logits.clone().to(device), problem.coefficients.to(device)
    targets = None if problem.targets is None else problem.targets.to(device)
    given = TopK(*(x.to(device) for x in teacher))
    rows = TopKRows(rows_module(impl))
    table = rows.row_forward(logits, targets, given, settings)
    rows.row_backward_(logits, targets, given, table, coefficients, settings)
    numbers, gradient = oracle_of(problem, teacher, settings)
    for name, x, y in zip(("logprob", "divergence", "entropy"), table[:3], numbers, strict=True):
        assert_close_to_oracle(x, y, name=name)
    # Where q is nearly 1 the oracle's own 1 - q has no digits below this.
    lost = (gradient == 0) & (logits.cpu().abs() < 1e-15)
    assert_close_to_oracle(logits.cpu().masked_fill(lost, 0.0), gradient, name="gradient")


def problem_of(std: float, targets: str = "any", **settings: object) -> RowProblem:
    """Targets: of any kind, the most likely ones, or none at all."""
    problem = make_row_problem(ROWS, VOCAB, VOCAB, std=std, **settings)
    if targets == "most likely":
        problem = replace(problem, targets=problem.teacher.argmax(-1))
    if targets == "none":
        only = torch.tensor([0.0, 1.0, 1.0]).unsqueeze(-1).to(problem.coefficients)
        problem = replace(problem, targets=None, coefficients=problem.coefficients * only)
    return problem


@pytest.mark.parametrize("targets", ["any", "most likely", "none"])
@pytest.mark.parametrize("count", [1, 5, VOCAB])
@pytest.mark.parametrize("std", [2.0, 12.0, 30.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rows_match_oracle(impl, beta, std, count, targets):
    """std 30: the tail is e^-70 of some rows, and none of its tokens has a probability in fp32."""
    problem = problem_of(std, targets)
    for softcap in (0.0, 20.0):
        settings = RowSettings(beta, 0.7, 1.0, softcap)
        judge(impl, problem, teacher_of(problem, count), settings)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rows_match_oracle_in_float64(beta):
    problem = problem_of(3.0, dtype=torch.float64)
    judge("torch", problem, teacher_of(problem, 5), RowSettings(beta, 0.7, 1.0, 5.0))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ruled_out_tokens(impl, beta):
    """-inf among the K, in the tail, and for all of the tail, which then is no bin."""
    problem = problem_of(2.0, "most likely")
    teacher = teacher_of(problem, 5)
    logits = problem.logits
    logits[0, teacher.ids[0, 3]] = -torch.inf
    logits[3, [v for v in range(VOCAB) if v not in teacher.ids[3]][:9]] = -torch.inf
    kept = logits[4, teacher.ids[4]].clone()
    logits[4] = -torch.inf
    logits[4, teacher.ids[4]] = kept
    judge(impl, problem, teacher, RowSettings(beta, 0.7))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bins_by_hand(beta):
    """q = (1/2, 1/4, 1/8, 1/8), p lists the first and the third: bins (1/2, 1/8, 3/8)."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    p = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    q, p_bins = torch.tensor([0.5, 0.125, 0.375]).double(), torch.tensor([0.25, 0.5, 0.25]).double()
    m = (1 - beta) * q + beta * p_bins
    kl = {
        0.0: (p_bins * (p_bins / q).log()).sum(),
        1.0: (q * (q / p_bins).log()).sum(),
        0.5: (0.5 * p_bins * (p_bins / m).log() + 0.5 * q * (q / m).log()).sum(),
    }
    ids = torch.tensor([[0, 2]])
    found = reference.top_k_divergence(logits, ids, p.log(), beta)
    assert found.item() == pytest.approx(kl[beta].item(), rel=1e-13)


def test_the_divergence_of_all_tokens_is_the_ordinary_one():
    """K = V, and a tail whose tokens have equal shares under both."""
    problem = make_row_problem(ROWS, VOCAB, VOCAB, dtype=torch.float64)
    found = problem.teacher.log_softmax(-1).topk(VOCAB)
    for beta in (0.0, 0.3, 1.0):
        expected = reference.token_divergence(problem.logits, problem.teacher, beta)
        actual = reference.top_k_divergence(problem.logits, found.indices, found.values, beta)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        few = reference.top_k_divergence(
            problem.logits, found.indices[:, :5], found.values[:, :5], beta
        )
        assert (few < expected).all() and (few > 0).all()


def test_gradcheck_of_the_oracle():
    problem = make_row_problem(3, 9, 9, dtype=torch.float64)
    teacher = problem.teacher.log_softmax(-1).topk(3)
    for beta in (0.0, 0.3, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, beta=beta: reference.top_k_divergence(
                x, teacher.indices, teacher.values, beta, 0.7
            ),
            problem.logits.clone().requires_grad_(),
        )


def test_a_sure_teacher_has_a_price_in_the_tail(impl):
    """Its K sum to 1, or a bit more; a student's mass elsewhere costs at most 16 nats."""
    problem = make_row_problem(1, VOCAB, VOCAB)
    logits = problem.logits.clone().to(device_of(impl))
    for total in (1.0, 1.0005):
        teacher = TopK(torch.tensor([[3]]), torch.tensor([[total]]).log())
        judge(impl, problem, teacher, RowSettings(1.0))
        rows = TopKRows(rows_module(impl))
        given = TopK(*(x.to(logits.device) for x in teacher))
        table = rows.row_forward(logits.clone(), None, given, RowSettings(1.0))
        assert 10.0 < table[1, 0].item() < 16.2


def test_a_token_beyond_the_vocabulary_makes_its_row_nan():
    """Where nobody looks before: on a GPU."""
    problem = make_row_problem(ROWS, VOCAB, VOCAB)
    teacher = teacher_of(problem, 5)
    teacher.ids[3, 2] = VOCAB
    table = TopKRows(torch_rows).row_forward(
        problem.logits.clone(), problem.targets, teacher, RowSettings()
    )
    assert table[1].isnan().nonzero().tolist() == [[3]]


# --------------------------------------------------------------------------------- planted mistakes

Plant = Callable[[pytest.MonkeyPatch], None]


def tail_by_subtraction(patch: pytest.MonkeyPatch) -> None:
    """1 - sum q_k in fp32, as TRL has it: no digits where the K have nearly everything."""

    def shares(capped: Tensor, tail: object, gone: Tensor, temperature: float) -> Tensor:
        good = log_shares(capped, tail, gone, temperature)
        of_k = good[:, :-1].float()
        rest = (1.0 - of_k.exp().sum(1, keepdim=True)).clamp(min=1e-7)
        return torch.cat((of_k, rest.log()), 1).double()

    log_shares = top_k_rows._log_shares
    patch.setattr(top_k_rows, "_log_shares", shares)


def other_teacher(change: Callable[[Tensor], Tensor]) -> Plant:
    good = top_k_rows._log_teacher
    return lambda patch: patch.setattr(
        top_k_rows, "_log_teacher", lambda *given: change(good(*given))
    )


def no_tail(log_p: Tensor) -> Tensor:
    """p over the K alone."""
    gone = log_p[:, -1:].isneginf() | (log_p[:, :-1] == -torch.inf).all(1, keepdim=True)
    return torch.cat((log_p[:, :-1], torch.where(gone, log_p[:, -1:], -torch.inf)), 1).log_softmax(
        1
    )


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    good = top_k_rows._log_teacher
    patch.setattr(
        top_k_rows,
        "_log_teacher",
        lambda logprobs, listed, gone: good(logprobs.nan_to_num(-1.0), listed | True, gone),
    )


def slope_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        top_k_rows, "_raw_gradient", lambda gradient, raw, settings: gradient / settings.temperature
    )


def target_left_as_the_kernels_have_it(patch: pytest.MonkeyPatch) -> None:
    """What all of the tail loses is added at the target, and stays there."""
    good = TopKRows.row_backward_

    def bad(self: TopKRows, logits: Tensor, targets: Tensor | None, *rest: object) -> None:
        before = self.bins
        self.bins = before._replace(target_bin=None)
        good(self, logits, None, *rest)

    patch.setattr(TopKRows, "row_backward_", bad)


def entropy_of_the_bins_alone(patch: pytest.MonkeyPatch) -> None:
    good = torch_rows.row_forward

    def bad(*given: object) -> Tensor:
        table = good(*given)
        if given[2] is None:  # the tail's
            table[2] = 0.0
        return table

    patch.setattr(torch_rows, "row_forward", bad)


FAULTS = {
    "tail by subtraction": tail_by_subtraction,
    "teacher without a tail": other_teacher(no_tail),
    "teacher's tail shifted": other_teacher(lambda x: x.roll(1, 1)),
    "padding counts": padding_counts,
    "softcap's slope forgotten": slope_forgotten,
    "target of the tail not corrected": target_left_as_the_kernels_have_it,
    "entropy of the bins alone": entropy_of_the_bins_alone,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, monkeypatch):
    problem = problem_of(12.0)
    # What the student is sure of, the teacher is not: its tail is large, the student's is small.
    unsure = replace(problem, teacher=problem.teacher / 12 + problem.logits * 1e-3)
    teacher = teacher_of(replace(problem, teacher=problem.logits), 5)
    mass = unsure.teacher.log_softmax(-1).gather(1, teacher.ids.clamp(min=0))
    teacher = TopK(teacher.ids, torch.where(teacher.ids < 0, torch.nan, mass))
    call = "torch", problem, teacher, RowSettings(0.0, 0.7, 1.0, 20.0)
    judge(*call)
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError) as caught:
        judge(*call)
    assert re.search("exceeds|is exactly", str(caught.value))
