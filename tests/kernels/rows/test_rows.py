"""Every back-end of the row contract against fp64 autograd of the oracle, value and gradient."""

import inspect
from dataclasses import replace

import pytest
import torch
from checks import (
    RowProblem,
    assert_close_to_oracle,
    assert_table_close,
    make_row_problem,
    row_oracle,
    rows_module,
    run_rows,
    unavailable,
)
from row_calls import FLOAT64, INF, KINDS, BackEnd, both_at, check, run

from kepo_kernels.rows.contract import NUM_STATS, RowSettings, RowStats, accumulate_dtype

BETAS = (0.0, 0.1, 0.5, 1.0)

# (n, V, V_t), temperature. Less than one block, odd; the teacher wider, the teacher narrower (both
# ends inside of a vector); more than one block of every back-end, odd.
CASES = (
    ((5, 37, 37), 1.0),
    ((5, 37, 37), 0.7),
    ((4, 203, 257), 0.7),
    ((3, 1000, 900), 1.0),
    ((2, 4099, 4099), 0.7),
)

# ------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("shape", "temperature"), CASES, ids=str)
def test_rows_match_oracle(back_end, shape, beta, temperature):
    check(back_end, make_row_problem(*shape, dtype=back_end.dtype), beta, temperature)


@pytest.mark.parametrize("beta", KINDS)
def test_one_token_vocabulary(back_end, beta):
    """Its only token has probability 1: all but the peaks is 0, to the bit, as is the gradient."""
    problem = make_row_problem(3, 1, 1, dtype=back_end.dtype)
    table, gradient = run(back_end, problem, beta, 0.7)
    expected = RowStats(*torch.zeros_like(table))
    expected.peak.copy_(problem.logits[:, 0])
    expected.teacher_peak.copy_(problem.teacher[:, 0])
    assert torch.equal(table, torch.stack(expected))
    assert not gradient.any()


@pytest.mark.parametrize("beta", BETAS)
def test_rows_match_oracle_on_peaked_logits(back_end, beta):
    problem = make_row_problem(4, 257, 257, std=12.0, offset=-30.0, dtype=back_end.dtype)
    check(back_end, problem, beta, 0.7)


@pytest.mark.parametrize("beta", KINDS)
def test_rows_match_oracle_near_the_teacher(back_end, beta):
    """Where distillation spends its time: the divergence is a small difference of large terms."""
    problem = make_row_problem(4, 257, 257, dtype=back_end.dtype)
    teacher = problem.logits + torch.randn(problem.logits.shape)
    check(back_end, replace(problem, teacher=teacher.to(back_end.dtype)), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_match_oracle_with_200_nat_tails(back_end, beta):
    """Where q and p both underflow m is 0 in floats, but log q/m is not."""
    problem = make_row_problem(4, 101, 101, dtype=back_end.dtype)
    problem.logits[:, 10:30] -= 200.0
    problem.teacher[:, 20:40] -= 200.0
    check(back_end, problem, beta)


@pytest.mark.parametrize("std", [2.0, 12.0])
def test_rows_without_teacher(back_end, std):
    check(back_end, make_row_problem(4, 203, std=std, dtype=back_end.dtype), 0.5, 0.7)


@pytest.mark.parametrize("teacher_vocab", [None, 257])
def test_rows_without_targets(back_end, teacher_vocab):
    """`logprob` is then a constant: what the loss sends back to it reaches no logit."""
    problem = make_row_problem(4, 203, teacher_vocab, dtype=back_end.dtype)
    assert problem.coefficients[0].all()
    check(back_end, replace(problem, targets=None), 0.5, 0.7)


@pytest.mark.parametrize("beta", KINDS)
@pytest.mark.parametrize("alone", [0, 1, 2], ids=["logprob", "divergence", "entropy"])
def test_each_coefficient_alone(back_end, alone, beta):
    problem = make_row_problem(4, 203, 150, dtype=back_end.dtype)
    problem.coefficients[[i for i in range(3) if i != alone]] = 0.0
    check(back_end, problem, beta, 0.7)


# --------------------------------------------------------- columns of next to no probability


def mostly_dead(back_end: BackEnd) -> RowProblem:
    """Three tokens share each row, the others are 30 to 48 nats down on both sides."""
    problem = make_row_problem(4, 519, 519, dtype=back_end.dtype)
    alive = torch.tensor([0, 257, 518])
    for logits in (problem.logits, problem.teacher):
        tops = logits[:, alive].clone()
        logits.copy_(2.0 * logits.clamp(-11.0, -5.0) - 22.0)
        logits[:, alive] = tops + 8.0
    problem.targets[:] = 257
    return problem


@pytest.mark.parametrize("beta", KINDS)
def test_columns_of_no_probability(back_end, beta):
    """A back-end may skip them; what they would have added is far below the tolerance."""
    check(back_end, mostly_dead(back_end), beta)


@pytest.mark.parametrize("beta", KINDS)
def test_what_may_not_be_skipped_among_them(back_end, beta):
    """The target, whatever its probability, and a token that lives on one side only."""
    problem = mostly_dead(back_end)
    problem.targets[:2] = 350
    problem.teacher[2, 300] = 1.0
    problem.logits[3, 301] = 1.0
    problem.logits[3, 400:500] = -INF
    problem.teacher[3, 400:500] = -INF
    check(back_end, problem, beta)


@pytest.mark.parametrize("column", [300, 515])  # in a whole vector, in the last one
@pytest.mark.parametrize("side", ["logits", "teacher"])
def test_nan_is_not_skipped_among_them(back_end, side, column):
    problem = mostly_dead(back_end)
    getattr(problem, side)[1, column] = torch.nan
    table, gradient = run(back_end, problem, 0.1)
    assert RowStats(*table).divergence.isnan().tolist() == [False, True, False, False]
    assert torch.equal(gradient.isnan().all(-1), gradient.isnan().any(-1))
    assert gradient.isnan().any(-1).tolist() == [False, True, False, False]


# ----------------------------------------------------------------------------- masked columns


@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
@pytest.mark.parametrize("beta", KINDS)
def test_masked_columns(back_end, beta, masked):
    """A logit of -inf is a token that cannot be: no probability, no gradient, no NaN.

    KL(a|b) is +inf where b rules out what a does not; no gradient is asked for there.
    """
    problem = make_row_problem(3, 131, 131, dtype=back_end.dtype)
    problem.targets[:] = 2
    for name, logits in (("student", problem.logits), ("teacher", problem.teacher)):
        if masked in (name, "both"):
            logits[:, 5:70] = -INF
            logits[0, -1] = -INF
    if (beta, masked) in ((0.0, "student"), (1.0, "teacher")):
        table, _ = run(back_end, problem, beta, 1.0)
        assert RowStats(*table).divergence.tolist() == [INF] * 3
        return
    assert row_oracle(problem, both_at(beta))[1].isfinite().all()
    check(back_end, problem, beta)


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_tail_beyond_the_shared_columns(back_end, wider):
    """Padding of the wider vocabulary leaves the divergence alone, be it masked or the peak."""
    shape = (3, 150, 131) if wider == "student" else (3, 131, 150)
    problem = make_row_problem(*shape, dtype=back_end.dtype)
    padded = problem.logits if wider == "student" else problem.teacher
    padded[0, 131:] = -INF
    padded[1, 131:] = 20.0
    check(back_end, problem, 0.5)


@pytest.mark.parametrize(("beta", "softcap"), [*((beta, 0.0) for beta in KINDS), (0.1, 6.0)])
def test_nan_stays_in_its_row_and_stays_nan(back_end, beta, softcap):
    clean = make_row_problem(3, 131, 131, dtype=back_end.dtype)
    problem = replace(clean, logits=clean.logits.clone())
    problem.logits[1, 77] = torch.nan
    expected, expected_gradient = run(back_end, clean, beta, softcap=softcap)
    table, gradient = run(back_end, problem, beta, softcap=softcap)
    assert table[:3, 1].isnan().all()  # logprob, divergence, entropy
    assert gradient[1].isnan().any()
    assert torch.equal(table[:, ::2], expected[:, ::2])
    assert torch.equal(gradient[::2], expected_gradient[::2])


# ------------------------------------------------------------------- layout, order, contract


def test_row_strides_and_what_lies_between_rows(back_end):
    """Slices of wider buffers: what lies beside them is neither read (it is NaN) nor written."""
    problem = make_row_problem(4, 203, 190, dtype=back_end.dtype)
    buffer = torch.full((4, 230), torch.nan, dtype=back_end.dtype, device=back_end.device)
    other = torch.full((4, 222), torch.nan, dtype=back_end.dtype, device=back_end.device)
    logits, teacher = buffer[:, 5:208], other[:, 3:193]
    logits.copy_(problem.logits)
    teacher.copy_(problem.teacher)
    assert_right_in_place(back_end, problem, logits, teacher)
    assert buffer[:, :5].isnan().all() and buffer[:, 208:].isnan().all()


def test_offsets_beyond_int32(back_end, tmp_path):
    """Row 2 starts past 2^31 elements, in a sparse file of which only three rows are touched."""
    if back_end.device != "cpu" or back_end.dtype == FLOAT64:
        pytest.skip("the file is CPU memory, and twice as long in fp64")
    problem = make_row_problem(3, 70, 70, dtype=back_end.dtype)
    pitch, path = 2**30 + 64, str(tmp_path / "sparse")
    store = torch.from_file(path, shared=True, size=2 * pitch + 70, dtype=back_end.dtype)
    logits = store.as_strided((3, 70), (pitch, 1))
    logits.copy_(problem.logits)
    assert_right_in_place(back_end, problem, logits, problem.teacher)


def assert_right_in_place(back_end, problem, logits, teacher):
    """As `check` does, on views of memory that the test laid out."""
    targets, coefficients = (x.to(back_end.device) for x in (problem.targets, problem.coefficients))
    settings = both_at(0.5, 0.7)
    table = back_end.rows.row_forward(logits, targets, teacher, settings)
    back_end.rows.row_backward_(logits, targets, teacher, table, coefficients, settings)
    stats, oracle = row_oracle(problem, settings)
    assert_table_close(table, problem, stats)
    assert_close_to_oracle(logits, oracle, name="gradient")


@pytest.mark.parametrize("teacher_vocab", [None, 37])
def test_no_rows(back_end, teacher_vocab):
    problem = make_row_problem(0, 37, teacher_vocab, dtype=back_end.dtype)
    table, gradient = run(back_end, problem, 0.5, 1.0)
    assert table.shape == (NUM_STATS, 0) and table.dtype == accumulate_dtype(back_end.dtype)
    assert gradient.shape == (0, 37)


@pytest.mark.parametrize("beta", KINDS)
def test_rows_depend_neither_on_their_place_nor_on_their_number(back_end, beta):
    problem = make_row_problem(5, 203, 203, dtype=back_end.dtype)
    table, gradient = run(back_end, problem, beta, 0.7)
    order = torch.tensor([4, 1])
    rows = (problem.logits[order], problem.targets[order], problem.teacher[order])
    moved = RowProblem(*rows, problem.coefficients[:, order].contiguous())
    moved_table, moved_gradient = run(back_end, moved, beta, 0.7)
    assert torch.equal(moved_table, table[:, order])
    assert torch.equal(moved_gradient, gradient[order])


@pytest.mark.parametrize("beta", KINDS)
@pytest.mark.parametrize("impl", ["torch", "cpu"])  # a GPU does not know of the number of threads
def test_rows_do_not_depend_on_the_number_of_threads(impl, beta):
    if reason := unavailable(impl):
        pytest.skip(reason)
    problem = make_row_problem(16, 4099, 4099)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_rows(rows_module(impl), problem, both_at(beta, 0.7))
        torch.set_num_threads(2)
        two = run_rows(rows_module(impl), problem, both_at(beta, 0.7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_signatures_are_those_of_the_contract(impl):
    rows, plain = rows_module(impl), rows_module("torch")
    for name in ("row_forward", "row_backward_"):
        assert inspect.signature(getattr(rows, name)) == inspect.signature(getattr(plain, name))


def test_triton_refuses_float64_by_name():
    if reason := unavailable("triton"):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"triton_rows: logits are float64.*impl='torch'"):
        run_rows(rows_module("triton"), make_row_problem(2, 5, dtype=FLOAT64), RowSettings())


def test_triton_says_what_it_expected():
    if reason := unavailable("triton"):
        pytest.skip(reason)
    problem = make_row_problem(2, 5)
    says = r"triton_rows: targets has shape \(1,\).*expected contiguous int64 of shape \(2,\) on"
    with pytest.raises(ValueError, match=says):
        sides = problem.logits, problem.targets[:1], problem.teacher
        rows_module("triton").row_forward(*sides, RowSettings())


def test_a_library_of_other_sources_is_refused(monkeypatch):
    """A table of another length would be written past its end."""
    cpu_rows = rows_module("cpu")
    if reason := unavailable("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(cpu_rows, "NUM_STATS", NUM_STATS + 1)
    cpu_rows.unavailable.cache_clear()
    assert "built from other sources; install again" in cpu_rows.unavailable()
    monkeypatch.undo()
    cpu_rows.unavailable.cache_clear()
    assert cpu_rows.unavailable() is None
