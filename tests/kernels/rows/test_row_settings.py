"""Softcaps and two temperatures in every back-end of the row contract."""

import pytest
from checks import assert_close_to_oracle, make_row_problem
from row_calls import INF, KINDS, check, run

from kepo_kernels.rows.contract import RowSettings, RowStats

# Each alone, then all at once; the caps bend (their argument reaches 2 to 4) but do not flatten.
SETTINGS = (
    ((5, 37, 37), {"temperature": 0.7, "teacher_temperature": 1.6}),
    ((4, 203, 257), {"softcap": 5.0}),
    ((3, 600, 451), {"teacher_softcap": 5.0}),
    ((2, 2101, 2101), dict(zip(RowSettings._fields[1:], (0.7, 1.6, 6.0, 9.0), strict=True))),
)


@pytest.mark.parametrize("beta", KINDS)
@pytest.mark.parametrize(("shape", "settings"), SETTINGS, ids=str)
def test_softcaps_and_temperatures(back_end, shape, settings, beta):
    check(back_end, make_row_problem(*shape, dtype=back_end.dtype), beta, **settings)


@pytest.mark.parametrize("softcap", [30.0, 8.0], ids=["some flattened", "nearly all flattened"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_softcaps_of_peaked_logits(back_end, beta, softcap):
    """Near the cap 1 - tanh^2 is what is left of a difference, if one takes the difference."""
    problem = make_row_problem(4, 257, 203, std=12.0, offset=-3.0, dtype=back_end.dtype)
    check(back_end, problem, beta, softcap=softcap, teacher_softcap=softcap)


def test_softcap_without_teacher(back_end):
    check(back_end, make_row_problem(4, 203, dtype=back_end.dtype), 0.5, 0.7, softcap=6.0)


@pytest.mark.parametrize("size", [1e-6, 0.1, 1.0], ids=str)
def test_softcap_of_small_arguments(back_end, size):
    """tanh x = x - x^3/3 there; 1 - 2/(1 + e^2x) would have no digits left of it."""
    problem = make_row_problem(4, 203, 203, std=2.0 * size, offset=0.0, dtype=back_end.dtype)
    check(back_end, problem, 1.0, temperature=size, softcap=4.0, teacher_softcap=2.0)


@pytest.mark.parametrize("beta", KINDS)
def test_one_token_vocabulary_under_softcaps(back_end, beta):
    problem = make_row_problem(3, 1, 1, dtype=back_end.dtype)
    table, gradient = run(back_end, problem, beta, 0.7, softcap=5.0, teacher_softcap=7.0)
    stats = RowStats(*table)
    assert_close_to_oracle(stats.peak, 5 * (problem.logits[:, 0].double() / 5).tanh(), name="peak")
    stats.peak.zero_()
    stats.teacher_peak.zero_()
    assert not table.any() and not gradient.any()


@pytest.mark.parametrize("beta", KINDS)
def test_masked_columns_under_softcaps(back_end, beta):
    """-inf stays -inf; +inf is as good as any large logit, and has no gradient either."""
    problem = make_row_problem(3, 131, 131, dtype=back_end.dtype)
    problem.targets[:] = 2
    for logits in (problem.logits, problem.teacher):
        logits[:, 5:70] = -INF
        logits[0, -1] = -INF
        logits[1, 3] = INF
    check(back_end, problem, beta, softcap=6.0, teacher_softcap=8.0)
