"""`--kepo-shape` for `pytest --benchmark-only benchmarks/`."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.losses.problems import SHAPES, parse_shape


def pytest_addoption(parser: pytest.Parser) -> None:
    shapes = f"N,H,Ht,V or one of {', '.join(SHAPES)} (default tiny)"
    parser.addoption("--kepo-shape", default="tiny", help=f"shape of the benchmarks: {shapes}")
    parser.addoption("--kepo-dtype", default="float32", help="float32 (default), bfloat16, float16")


def pytest_configure(config: pytest.Config) -> None:
    try:
        parse_shape(config.getoption("--kepo-shape"))
    except argparse.ArgumentTypeError as error:
        raise pytest.UsageError(f"--kepo-shape {error}") from error
