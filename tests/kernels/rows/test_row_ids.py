"""The C++ rows called by themselves refuse ids that would be read out of bounds."""

import pytest
import torch
from checks import make_row_problem, unavailable

from kepo_kernels.rows.contract import RowSettings, RowStats

SETTINGS = RowSettings()
PEAK = RowStats._fields.index("peak_token")


@pytest.fixture
def rows():
    if reason := unavailable("cpu"):
        pytest.skip(reason)
    from kepo_kernels.rows import cpu_rows

    return cpu_rows


@pytest.mark.parametrize("bad", [37, -1, -100, 1_000_101, 2**62])
def test_targets(rows, bad):
    problem = make_row_problem(3, 37, 45)
    table = rows.row_forward(problem.logits, problem.targets, problem.teacher, SETTINGS)
    targets = problem.targets.clone()
    targets[1] = bad
    says = rf"targets holds {bad} in row 1; expected ids in \[0, 37\)"
    before = problem.logits.clone()
    with pytest.raises(ValueError, match=says):
        rows.row_forward(problem.logits, targets, problem.teacher, SETTINGS)
    back = table, problem.coefficients, SETTINGS
    with pytest.raises(ValueError, match=says):
        rows.row_backward_(problem.logits, targets, problem.teacher, *back)
    assert torch.equal(problem.logits, before)
    for fine in (0, 36):
        targets[1] = fine
        assert rows.row_forward(problem.logits, targets, None, SETTINGS).isfinite().all()


@pytest.mark.parametrize("bad", [29.0, -1.0, 1e9, float("nan"), float("inf")])
def test_the_table(rows, bad):
    """The backward reads the logit of the peak, a column that the forward wrote down."""
    problem = make_row_problem(3, 37, 29)
    sides = problem.logits, problem.targets, problem.teacher
    table = rows.row_forward(*sides, SETTINGS)
    table[PEAK, 2] = bad
    with pytest.raises(ValueError, match=rf"peak_token holds {bad} in row 2; .*\[0, 29\)"):
        rows.row_backward_(*sides, table, problem.coefficients, SETTINGS)


def test_a_teacher_without_columns(rows):
    problem = make_row_problem(3, 37, 29)
    says = r"cpu_rows: teacher has shape \(3, 0\).*expected torch.float32 of shape \(3, V_t\)"
    with pytest.raises(ValueError, match=says):
        rows.row_forward(problem.logits, problem.targets, problem.teacher[:, :0], SETTINGS)


def test_no_rows(rows):
    problem = make_row_problem(3, 37, 29)
    sides = (x[:0] for x in (problem.logits, problem.targets, problem.teacher))
    assert rows.row_forward(*sides, SETTINGS).shape == (len(RowStats._fields), 0)
