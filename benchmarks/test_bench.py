"""The cases of bench_loss.py through pytest-benchmark: pytest --benchmark-only benchmarks/"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_loss import DTYPES, provider_of
from benchmarks.losses.losses_of_ours import CASES, NotComparable
from benchmarks.losses.peers import PEERS, dtypes
from benchmarks.losses.problems import ALL, Problem, parse_shape

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    shape = parse_shape(request.config.getoption("--kepo-shape"))
    dtype = DTYPES[request.config.getoption("--kepo-dtype")]
    return Problem.make(shape, dtype, torch.device("cpu"))


@pytest.mark.parametrize("provider", ALL)
@pytest.mark.parametrize("case", CASES)
def test_bench(benchmark, problem: Problem, case: str, provider: str) -> None:
    benchmark.group = case
    try:
        if provider in PEERS:
            problem = problem.cast(dtypes(problem.hidden.dtype, problem.hidden.device)[0])
        call = provider_of(provider, grad_tol=5e-4)(problem, case)
    except NotComparable as reason:
        pytest.skip(f"{provider}: {reason}")
    dtype = str(problem.hidden.dtype).removeprefix("torch.")
    benchmark.extra_info |= {"N": problem.rows, "entropy": problem.entropy, "dtype": dtype}
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
