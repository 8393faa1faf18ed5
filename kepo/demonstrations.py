"""Choose a demonstration: the digits, or with ``--scans`` the average brain."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo demo``; return its exit code."""
    others = [word for word in arguments if word != "--scans"]
    name = "kepo.digits.demo" if len(others) == len(arguments) else "kepo.scans.study"
    return import_module(name).main(others)
