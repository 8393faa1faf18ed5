"""Every back-end of the row contract against fp64 autograd of the oracle, value and gradient."""

import inspect
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from checks import (
    RowProblem,
    assert_close_to_oracle,
    assert_rows_right,
    assert_table_close,
    device_of,
    make_row_problem,
    row_oracle,
    rows_module,
    run_rows,
    unavailable,
)
from torch.nn import functional as F

from kepo_kernels.rows import NUM_STATS, RowStats, accumulate_dtype

INF = float("inf")
FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
BETAS = (0.0, 0.1, 0.5, 1.0)
KINDS = (0.0, 0.1, 1.0)  # one beta for each formula

# (n, V, V_t), temperature. Less than one block, odd; the teacher wider, the teacher narrower (both
# ends inside of a vector); more than one block of every back-end, odd.
CASES = (
    ((5, 37, 37), 1.0),
    ((5, 37, 37), 0.7),
    ((4, 203, 257), 0.7),
    ((3, 1000, 900), 1.0),
    ((2, 4099, 4099), 0.7),
)

BACK_ENDS = (
    *(("torch", dtype) for dtype in (FLOAT32, FLOAT64, BFLOAT16)),
    *((f"cpu-{isa}", t) for isa in ("baseline", "avx2", "avx512") for t in (FLOAT32, BFLOAT16)),
    # Triton's interpreter truncates fp32 to bf16. That the tests see these gradients rounded, as a
    # GPU rounds them, is the doing of `interpret.checked`.
    *(("triton", dtype) for dtype in (FLOAT32, BFLOAT16)),
)


@dataclass(frozen=True)
class BackEnd:
    rows: ModuleType
    dtype: torch.dtype
    device: str


@pytest.fixture(params=BACK_ENDS, ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}")
def back_end(request, monkeypatch) -> BackEnd:
    name, dtype = request.param
    impl, _, isa = name.partition("-")
    if reason := unavailable(impl):
        pytest.skip(f"{impl}: {reason}")
    rows = rows_module(impl)
    if isa:
        monkeypatch.setenv("KEPO_CPU_ISA", isa)
        try:
            rows.isa()
        except ValueError as error:
            pytest.skip(str(error))
    return BackEnd(rows, dtype, device_of(impl))


def check(back_end: BackEnd, problem: RowProblem, beta: float, temperature: float = 1.0) -> None:
    assert_rows_right(back_end.rows, problem, beta, temperature, back_end.device)


# ------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("shape", "temperature"), CASES, ids=str)
def test_rows_match_oracle(back_end, shape, beta, temperature):
    check(back_end, make_row_problem(*shape, dtype=back_end.dtype), beta, temperature)


@pytest.mark.parametrize("beta", KINDS)
def test_one_token_vocabulary(back_end, beta):
    """Its only token has probability 1: all but the peaks is 0, to the bit, as is the gradient."""
    problem = make_row_problem(3, 1, 1, dtype=back_end.dtype)
    table, gradient = run_rows(back_end.rows, problem, beta, 0.7, back_end.device)
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
        table, _ = run_rows(back_end.rows, problem, beta, 1.0, back_end.device)
        assert RowStats(*table).divergence.tolist() == [INF] * 3
        return
    assert row_oracle(problem, beta, 1.0)[1].isfinite().all()
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


@pytest.mark.parametrize("beta", KINDS)
def test_nan_stays_in_its_row_and_stays_nan(back_end, beta):
    clean = make_row_problem(3, 131, 131, dtype=back_end.dtype)
    problem = replace(clean, logits=clean.logits.clone())
    problem.logits[1, 77] = torch.nan
    expected, expected_gradient = run_rows(back_end.rows, clean, beta, 1.0, back_end.device)
    table, gradient = run_rows(back_end.rows, problem, beta, 1.0, back_end.device)
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
    table = back_end.rows.row_forward(logits, targets, teacher, 0.5, 0.7)
    back_end.rows.row_backward_(logits, targets, teacher, table, coefficients, 0.5, 0.7)
    stats, oracle = row_oracle(problem, 0.5, 0.7)
    assert_table_close(table, problem, stats)
    assert_close_to_oracle(logits, oracle, name="gradient")


@pytest.mark.parametrize("teacher_vocab", [None, 37])
def test_no_rows(back_end, teacher_vocab):
    problem = make_row_problem(0, 37, teacher_vocab, dtype=back_end.dtype)
    table, gradient = run_rows(back_end.rows, problem, 0.5, 1.0, back_end.device)
    assert table.shape == (NUM_STATS, 0) and table.dtype == accumulate_dtype(back_end.dtype)
    assert gradient.shape == (0, 37)


@pytest.mark.parametrize("beta", KINDS)
def test_rows_depend_neither_on_their_place_nor_on_their_number(back_end, beta):
    problem = make_row_problem(5, 203, 203, dtype=back_end.dtype)
    table, gradient = run_rows(back_end.rows, problem, beta, 0.7, back_end.device)
    order = torch.tensor([4, 1])
    rows = (problem.logits[order], problem.targets[order], problem.teacher[order])
    moved = RowProblem(*rows, problem.coefficients[:, order].contiguous())
    moved_table, moved_gradient = run_rows(back_end.rows, moved, beta, 0.7, back_end.device)
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
        one = run_rows(rows_module(impl), problem, beta, 0.7)
        torch.set_num_threads(2)
        two = run_rows(rows_module(impl), problem, beta, 0.7)
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
        run_rows(rows_module("triton"), make_row_problem(2, 5, dtype=FLOAT64))


# ---------------------------------------------------------------------- can these tests fail?


def faulty(fault: str) -> SimpleNamespace:
    """`torch_rows` with one mistake in it."""
    good = rows_module("torch")
    changes = {
        "zero gradient": lambda x, _: x.zero_(),
        "sign flip": lambda x, _: x.neg_(),
        "dropped last row": lambda x, _: x[-1].zero_(),
        "temperature not applied in gradient": lambda x, temperature: x.mul_(temperature),
        "gradient scaled by 1.05": lambda x, _: x.mul_(1.05),
    }

    def row_forward(logits, targets, teacher, beta, temperature):
        if fault == "phantom columns":  # what a kernel without a mask reads past the end
            logits, teacher = F.pad(logits, (0, 16)), F.pad(teacher, (0, 16))
        teacher = None if fault == "ignored divergence" else teacher
        beta = 0.0 if fault == "forward instead of reverse" else beta
        return good.row_forward(logits, targets, teacher, beta, temperature)

    def row_backward_(logits, targets, teacher, table, coefficients, beta, temperature):
        beta = 0.0 if fault == "forward instead of reverse in gradient" else beta
        good.row_backward_(logits, targets, teacher, table, coefficients, beta, temperature)
        changes.get(fault, lambda *_: None)(logits, temperature)

    return SimpleNamespace(row_forward=row_forward, row_backward_=row_backward_)


FAULTS = (
    "zero gradient",
    "sign flip",
    "dropped last row",
    "phantom columns",
    "ignored divergence",
    "forward instead of reverse",
    "forward instead of reverse in gradient",
    "temperature not applied in gradient",
    "gradient scaled by 1.05",
)


@pytest.mark.parametrize("std", [2.0, 12.0])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, dtype, std):
    problem = make_row_problem(4, 203, 203, std=std, offset=-4 * std, dtype=dtype)
    assert_rows_right(faulty("none"), problem, 1.0, 0.7)
    with pytest.raises(AssertionError):
        assert_rows_right(faulty(fault), problem, 1.0, 0.7)


@pytest.fixture
def interpreted() -> ModuleType:
    if (reason := unavailable("triton")) or not (rows := rows_module("triton")).INTERPRETED:
        pytest.skip(reason or "not interpreted: the kernels run on a GPU")
    return rows


def test_out_of_bounds_is_caught(interpreted, monkeypatch):
    monkeypatch.setattr(interpreted, "shared_columns", lambda logits, _: logits.shape[1] + 1)
    with pytest.raises(Exception, match="1 lanes of a load lie outside of"):
        run_rows(interpreted, make_row_problem(1, 37, 37))


def test_race_between_programs_is_caught(interpreted):
    problem = make_row_problem(2, 37)
    one_row = problem.logits[:1].expand(2, -1)
    table = interpreted.row_forward(one_row, None, None, 0.0, 1.0)
    with pytest.raises(AssertionError, match="race: 37 addresses"):
        interpreted.row_backward_(one_row, None, None, table, problem.coefficients, 0.0, 1.0)
