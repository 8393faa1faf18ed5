"""What only the Triton rows have: sections of a row, and launch parameters by rule."""

import pytest
import torch
from checks import (
    assert_close_to_oracle,
    assert_rows_right,
    device_of,
    make_problem,
    make_row_problem,
    row_oracle,
    rows_module,
    run_rows,
    unavailable,
)
from row_calls import BFLOAT16, FLOAT32, KINDS, both_at

import kepo_kernels
from kepo_kernels.compute import gemm

triton_rows = rows_module("triton")


@pytest.fixture(autouse=True)
def available():
    if reason := unavailable("triton"):
        pytest.skip(reason)


@pytest.fixture
def short_sections(monkeypatch):
    """Rows of 4,099 columns then have three of them, the last of three columns."""
    for name in ("SECTION", "SOFTMAX_BLOCK"):
        monkeypatch.setattr(triton_rows, name, triton_rows.BLOCK)


# Student's and teacher's vocabulary: equal; a cut inside of a section; at the end of one; before
# the first whole one.
WIDTHS = ((4099, 4099), (4099, 2500), (4099, 2048), (4099, 3), (2500, 4099))


@pytest.mark.parametrize("beta", KINDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_rows_of_many_sections(short_sections, widths, beta):
    problem = make_row_problem(2, *widths)
    assert_rows_right(triton_rows, problem, both_at(beta, 0.7), device_of("triton"))


def test_rows_of_many_sections_without_teacher(short_sections):
    problem = make_row_problem(2, 4099, dtype=BFLOAT16)
    assert_rows_right(triton_rows, problem, both_at(0.5, 0.7), device_of("triton"))


def test_sections_of_next_to_no_probability(short_sections):
    """A section 60 nats below the others, and one of nothing but -inf."""
    problem = make_row_problem(2, 4099, 4099)
    for logits in (problem.logits, problem.teacher):
        logits[0, :2048] -= 60.0
        logits[1, 2048:4096] = -torch.inf
    problem.targets[:] = 4098
    assert_rows_right(triton_rows, problem, both_at(0.5), device_of("triton"))


def test_sections_are_as_long_as_a_program_can_merge():
    most = triton_rows.MOST_SECTIONS
    for vocab in (1, 2048, 151936, 262144, 1 << 22, (1 << 22) + 1, 1 << 27):
        for least in (triton_rows.SOFTMAX_BLOCK, triton_rows.SECTION):
            section = triton_rows.section_length(vocab, least)
            assert section % least == 0
            for shared in (1, vocab // 3, vocab - 1, vocab):  # the cut makes one more at most
                if shared > 0:
                    assert -(-shared // section) - (-(vocab - shared) // section) <= most
    assert triton_rows.section_length(262144, triton_rows.SECTION) == triton_rows.SECTION


def test_a_warp_of_64_threads_halves_their_number(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    cuda = triton_rows.warps(256)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_rows.warps(256) * 2 == cuda == 8


@pytest.mark.parametrize("impl", ["torch", "cpu", "triton"])
def test_gradient_beside_the_logits(impl):
    """`out` of another dtype gets the same gradient, rounded once."""
    if reason := unavailable(impl):
        pytest.skip(reason)
    rows, device, settings = rows_module(impl), device_of(impl), both_at(0.5, 0.7)
    problem = make_row_problem(4, 203, 150)
    _, oracle = row_oracle(problem, settings)
    _, in_place = run_rows(rows, problem, settings, device)
    logits, targets, teacher, coefficients = (
        x.clone().to(device)
        for x in (problem.logits, problem.targets, problem.teacher, problem.coefficients)
    )
    table = rows.row_forward(logits, targets, teacher, settings)
    out = torch.empty(4, 210, dtype=BFLOAT16, device=device)[:, 4:207]
    rows.row_backward_(logits, targets, teacher, table, coefficients, settings, out)
    assert torch.equal(out.cpu(), in_place.bfloat16())
    assert_close_to_oracle(out, oracle, name="gradient")


def test_losses_with_the_gradient_beside_the_logits(monkeypatch):
    """As on CUDA, where dlogits are written in the dtype that the products take."""
    monkeypatch.setattr(gemm, "dlogits_dtype", lambda dtype, *_: dtype)
    x = make_problem(dtype=BFLOAT16)
    head = x.lm_head.requires_grad_()

    def gradient(impl: str) -> torch.Tensor:
        loss = kepo_kernels.fused_gated_kd_loss(
            x.hidden,
            head,
            x.teacher_hidden,
            x.teacher_lm_head,
            gate=x.gate,
            logits_dtype=FLOAT32,
            impl=impl,
        )
        return torch.autograd.grad(loss, head)[0]

    if device_of("triton") != "cpu":
        pytest.skip("the tensors are CPU's")
    beside = gradient("triton")
    monkeypatch.undo()
    in_place = gradient("torch")
    assert beside.any()
    assert float((beside - in_place).norm() / in_place.norm()) < 2**-7  # dlogits rounded to bf16
