"""Drawn cases on every back-end: right, deaf to what takes no part, and refused when spoilt."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from case_errors import ERRORS
from case_judge import well_conditioned
from case_product import CHOICES, OF_LOSS, choices, drawn, poisoned, weights_of
from cases import KernelCase
from checks import unavailable
from loss_calls import assert_same_bits, function_of, fused

from kepo_kernels.errors import KepoInputError

QUICK = 240
BLOCK, BLOCKS = 400, 16
INTERPRETED = 150  # Triton's interpreter takes a second for what the others do in 30 ms
ILL_CONDITIONED = "ill-conditioned"
AT_MOST = 0.02  # of the cases; see case_judge.py


@pytest.fixture(scope="module")
def count(request):
    """What was compared; printed after the last test, captured or not."""
    counter = Counter()
    yield counter
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(counter.items()))
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{counter.total()} combinations of shape, dtype and options: {kinds}")


def impl_of(number: int, case: KernelCase) -> str:
    """fp64 has the torch rows alone; the others take turns."""
    if case.dtype == torch.float64 or unavailable("cpu"):
        return "torch"
    return ("cpu", "torch")[number % 2]


def judge(number: int, impl: str | None = None) -> str:
    """Compare with the oracle, and with itself poisoned; the back-end, or that nothing can tell."""
    case = drawn(number)
    if impl == "triton" and case.dtype == torch.float64:
        case = replace(case, dtype=torch.float32)
    impl = impl or impl_of(number, case)
    call = case.call()
    try:
        verdict = impl if well_conditioned(case.loss, call, impl, case.frozen) else ILL_CONDITIONED
    except AssertionError as error:
        raise AssertionError(f"case {number} on {impl}: {error}\n{choices(number)}") from error
    clean, spoilt = (fused(case.loss, c, impl, case.frozen) for c in (call, poisoned(call)))
    try:
        assert_same_bits(spoilt, clean)
    except AssertionError as error:
        raise AssertionError(f"case {number}, poisoned: {error}\n{choices(number)}") from error
    return verdict


def judge_all(numbers: range, count: Counter, impl: str | None = None) -> None:
    verdicts = Counter(judge(number, impl) for number in numbers)
    count.update(verdicts)
    assert verdicts[ILL_CONDITIONED] <= max(2, AT_MOST * len(numbers))


def test_drawn_cases(count):
    judge_all(range(QUICK), count)


def test_drawn_cases_interpreted(count):
    if reason := unavailable("triton"):
        pytest.skip(f"triton: {reason}")
    judge_all(range(8), count, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_many_drawn_cases(block, count):
    judge_all(range(block * BLOCK, (block + 1) * BLOCK), count)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_drawn_cases_interpreted(count):
    if reason := unavailable("triton"):
        pytest.skip(f"triton: {reason}")
    judge_all(range(INTERPRETED), count, "triton")


def test_every_pair_of_choices_is_drawn():
    """No two values of any two choices are left that never met in the slow run."""
    met = set()
    for number in range(BLOCK * BLOCKS):
        met.update(combinations(sorted((k, str(v)) for k, v in choices(number).items()), 2))
    for loss, of_loss in OF_LOSS.items():
        values = {
            name: [str(v) for v in options]
            for name, options in (CHOICES | of_loss | {"loss": (loss,)}).items()
        }
        for a, b in combinations(sorted(values), 2):
            missing = {((a, x), (b, y)) for x in values[a] for y in values[b]} - met
            assert not missing, f"{len(missing)} pairs of {a} and {b}: {sorted(missing)[0]}"


@pytest.mark.parametrize("error", ERRORS)
def test_spoilt_cases_are_refused(error, impl):
    """The first drawn calls with this argument and an active token in every term."""
    needed, edit, named = ERRORS[error]
    tried = 0
    for number in range(200):
        case = drawn(number)
        call = case.call()
        if call.get(needed) is None or not all(w.any() for w in weights_of(call).values()):
            continue
        if case.dtype == torch.float64 and impl != "torch":
            continue
        function = function_of(case.loss)
        with pytest.raises(KepoInputError, match=rf"^{function.__name__}: .*{re.escape(named)}"):
            function(**call | edit(call) | {"impl": impl})
        tried += 1
        if tried == 3:
            return
    raise AssertionError("hardly any drawn case fits")
