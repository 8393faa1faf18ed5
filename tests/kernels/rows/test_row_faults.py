"""Can the tests of the rows fail? Planted mistakes, and the comparisons that must notice."""

from types import ModuleType, SimpleNamespace

import pytest
from checks import assert_rows_right, make_row_problem, rows_module, run_rows, unavailable
from row_calls import BFLOAT16, FLOAT32, both_at
from torch.nn import functional as F

from kepo_kernels.rows.contract import RowSettings


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
    in_forward = {
        "forward instead of reverse": {"beta": 0.0},
        "cap 3 % off": {"softcap": 6.18},
        "teacher's cap ignored": {"teacher_softcap": 0.0},
        "teacher at the student's temperature": {"teacher_temperature": 0.7},
    }
    in_backward = {
        "forward instead of reverse in gradient": {"beta": 0.0},
        "teacher's cap ignored in gradient": {"teacher_softcap": 0.0},
        "teacher at the student's temperature in gradient": {"teacher_temperature": 0.7},
    }

    def row_forward(logits, targets, teacher, settings):
        if fault == "phantom columns":  # what a kernel without a mask reads past the end
            logits, teacher = F.pad(logits, (0, 16)), F.pad(teacher, (0, 16))
        teacher = None if fault == "ignored divergence" else teacher
        settings = settings._replace(**in_forward.get(fault, {}))
        return good.row_forward(logits, targets, teacher, settings)

    def row_backward_(logits, targets, teacher, table, coefficients, settings):
        settings = settings._replace(**in_backward.get(fault, {}))
        if fault == "cap without slope":
            slope = good.cap_slope(logits, table.dtype, settings.softcap)
        good.row_backward_(logits, targets, teacher, table, coefficients, settings)
        changes.get(fault, lambda *_: None)(logits, settings.temperature)
        if fault == "cap without slope":
            logits /= slope

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
    assert_rows_right(faulty("none"), problem, both_at(1.0, 0.7))
    # A phantom column may become the peak, which the backward then looks for in vain.
    with pytest.raises((AssertionError, RuntimeError), match=r"exceeds|exactly|out of bounds"):
        assert_rows_right(faulty(fault), problem, both_at(1.0, 0.7))


CAP_FAULTS = (
    "cap 3 % off",
    "cap without slope",
    "teacher's cap ignored",
    "teacher's cap ignored in gradient",
    "teacher at the student's temperature",
    "teacher at the student's temperature in gradient",
)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fault", CAP_FAULTS)
def test_planted_faults_of_caps_and_temperatures_are_caught(fault, dtype):
    problem = make_row_problem(4, 203, 203, dtype=dtype)
    settings = RowSettings(1.0, 0.7, 1.6, softcap=6.0, teacher_softcap=9.0)
    assert_rows_right(faulty("none"), problem, settings)
    with pytest.raises(AssertionError):
        assert_rows_right(faulty(fault), problem, settings)


@pytest.fixture
def interpreted() -> ModuleType:
    if (reason := unavailable("triton")) or not (rows := rows_module("triton")).INTERPRETED:
        pytest.skip(reason or "not interpreted: the kernels run on a GPU")
    return rows


def test_out_of_bounds_is_caught(interpreted, monkeypatch):
    monkeypatch.setattr(interpreted, "shared_columns", lambda logits, _: logits.shape[1] + 1)
    with pytest.raises(Exception, match="1 lanes of a load lie outside of"):
        run_rows(interpreted, make_row_problem(1, 37, 37), RowSettings())


def test_race_between_programs_is_caught(interpreted):
    problem = make_row_problem(2, 37)
    one_row = problem.logits[:1].expand(2, -1)
    table = interpreted.row_forward(one_row, None, None, RowSettings())
    with pytest.raises(AssertionError, match="race: 37 addresses"):
        interpreted.row_backward_(one_row, None, None, table, problem.coefficients, RowSettings())
