"""Rows in which student and teacher are nearly certain, of different tokens.

There log q/m at the student's token and its mean under q are nearly the same number, and the
gradient is their difference. Every back-end is held to what plain PyTorch makes of it in fp32.
"""

import pytest
import torch
from checks import RELATIVE_ERROR, RowProblem, assert_close_to_oracle, run_rows
from row_calls import BackEnd, both_at
from torch import Tensor

from kepo_kernels import reference

BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
SPREADS = (8.0, 16.0)  # standard deviations of the logits
TEMPERATURES = (0.7, 1.0)
OF_EAGER = 0.75  # the largest error there may be, over eager's, where it is above the tolerance


def sure(rows: int, vocab: int) -> RowProblem:
    """Student and teacher leave 1e-4 of their probability to all tokens but one each."""
    problem = certain(rows, vocab, 1.0)
    problem.logits[:, 3] += 15.0
    problem.teacher[:, vocab // 2] += 15.0
    return problem


def certain(rows: int, vocab: int, spread: float) -> RowProblem:
    logits, teacher = (spread * torch.randn(rows, vocab) for _ in range(2))
    coefficients = torch.zeros(3, rows)
    coefficients[1] = 1.0
    return RowProblem(logits, None, teacher, coefficients)


def gradient(problem: RowProblem, beta: float, temperature: float, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch's, in this dtype."""
    logits = problem.logits.to(dtype, copy=True).requires_grad_()
    teacher = problem.teacher.to(dtype)
    numbers = reference.token_divergence(logits / temperature, teacher / temperature, beta)
    return torch.autograd.grad(numbers.sum(), logits)[0]


def errors(back_end: BackEnd, rows: int, vocab: int) -> list[tuple]:
    """(beta, spread, temperature, eager's relative error, this back-end's) of every case."""
    found = []
    for spread in SPREADS:
        problem = certain(rows, vocab, spread)
        for beta in BETAS:
            for temperature in TEMPERATURES:
                oracle = gradient(problem, beta, temperature, torch.float64)
                eager = gradient(problem, beta, temperature, torch.float32)
                settings = both_at(beta, temperature)
                _, ours = run_rows(back_end.rows, problem, settings, back_end.device)
                relative = [
                    float((x.double() - oracle).norm() / oracle.norm()) for x in (eager, ours)
                ]
                found.append((beta, spread, temperature, *relative))
    return found


def judged(back_end: BackEnd, rows: int, vocab: int) -> None:
    found = errors(back_end, rows, vocab)
    print(f"\n{back_end.rows.__name__}, V={vocab}: relative error of the gradient")
    print(
        f"{'beta':>5} {'spread':>6} {'temperature':>11} {'eager':>9} {'ours':>9} {'over eager':>10}"
    )
    for beta, spread, temperature, eager, ours in found:
        numbers = f"{beta:5} {spread:6g} {temperature:11} {eager:9.1e} {ours:9.1e}"
        print(f"{numbers} {ours / eager:10.2f}")
    for *case, eager, ours in found:
        right = ours <= max(OF_EAGER * eager, RELATIVE_ERROR[torch.float32])
        assert right, (
            f"beta, spread, temperature {case}: {ours:.1e} is {ours / eager:.1f} over eager's"
        )


def assert_right_where_sure(back_end: BackEnd, beta: float) -> None:
    problem = sure(4, 211)
    _, ours = run_rows(back_end.rows, problem, both_at(beta), back_end.device)
    oracle = gradient(problem, beta, 1.0, torch.float64)
    raised = 2.0**30  # near beta = 1 it is small, which changes nothing
    assert_close_to_oracle(ours * raised, oracle * raised, name="gradient")
    if beta in (0.1, 0.5):
        plain = gradient(problem, beta, 1.0, torch.float32)
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_to_oracle(plain, oracle, name="plain PyTorch")


@pytest.fixture
def fp32_back_end(back_end) -> BackEnd:
    if back_end.dtype != torch.float32:
        pytest.skip("fp32 is compared with fp32")
    return back_end


@pytest.mark.parametrize("beta", (*BETAS, 1e-6, 1e-4, 0.9999, 0.999999))
def test_sure_of_different_tokens(fp32_back_end, beta):
    """What is lost to cancellation in plain PyTorch is not lost here: as exact as any other row."""
    assert_right_where_sure(fp32_back_end, beta)


@pytest.mark.slow
def test_certain_rows(fp32_back_end):
    judged(fp32_back_end, 16, 211)


@pytest.mark.slow
def test_certain_rows_of_a_real_vocabulary(fp32_back_end):
    judged(fp32_back_end, 3, 32768)
