"""The losses with every torch that is promised: eager, compiled, one graph, changing numbers.

    make torches && python tools/torches.py .venv/torch-*
    python tools/torches.py --csv benchmarks/results/torch_versions.csv .venv/torch-*

Each folder holds a torch, as fetch_torch.py leaves it; the one that is installed comes last. With
each of them the tests below run in a process that finds it first. The table shows the version that
this process imported, and of each kind of test how many passed. Exit status 1 if a test failed, a
kind has none, the C++ library did not load, or another torch than that of the folder was imported.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

ROOT = Path(__file__).resolve().parents[1]
COMPILED = [
    "tests/kernels/compute/test_compile.py",
    "tests/kernels/compute/test_compile_numbers.py",
]
# A sample for the back-ends of a CPU: values, gradients, rows, heads.
EAGER = [
    f"tests/kernels/{name}.py"
    for name in ("test_losses", "compute/test_autograd", "rows/test_rows", "test_heads")
]
SELECTED = "not triton and not inductor"  # no GPU, and no C++ compiler behind torch
# By words in the name of a test of torch.compile; the first that fits.
KINDS = {
    "eager": (),
    "breaks": ("break", "wrong_calls", "double_backward", "transforms"),
    "dynamic": ("-True]", "all_lengths", "lengths_and_numbers"),
    "changing": ("test_compile_numbers",),
    "fullgraph": ("test_compile",),
}


@dataclass
class Line:
    """What one torch did. `asked` is the folder's version, None for the installed one."""

    asked: str | None
    torch: str
    cpp: str
    """The instruction set of the C++ rows, or why they are not live."""
    live: bool
    passed: dict[str, int] = field(default_factory=dict)
    failed: int = 0

    @property
    def right(self) -> bool:
        found = self.asked is None or self.torch.split("+")[0] == self.asked
        return found and self.live and self.failed == 0 and all(self.passed[x] for x in KINDS)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    started = time.perf_counter()
    folders = sorted(args.folders, key=version_of) + [None] * args.installed
    with ThreadPoolExecutor(args.jobs) as pool:
        lines = list(pool.map(tested, folders))
    print_table(lines)
    if args.csv:
        write(args.csv, lines)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if lines and all(line.right for line in lines) else 1


def tested(folder: Path | None) -> Line:
    """What pytest counted with the folder's torch."""
    asked = None if folder is None else folder.resolve().name.removeprefix("torch-")
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch, "counts.json")
        command = [sys.executable, __file__, "--count-tests", counts]
        there = environment(folder)
        done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
        if not counts.exists():
            raise SystemExit(done.stdout + done.stderr)
        line = Line(asked, **json.loads(counts.read_text(encoding="utf-8")))
    if done.returncode != 0:
        print(f"--- torch {line.torch}\n{done.stdout}")
        line.failed = max(line.failed, 1)
    return line


def count_tests(path: Path) -> int:
    """Runs the tests in this process, and writes down what came of them."""
    import pytest
    import torch

    from kepo_kernels.rows import cpu_rows
    from kepo_kernels.rows.dispatch import unavailable

    passed, failed = dict.fromkeys(KINDS, 0), 0

    class Counter:
        def pytest_runtest_logreport(self, report) -> None:
            nonlocal failed
            if report.outcome == "failed":
                failed += 1
            elif report.when == "call" and report.outcome == "passed":
                passed[kind_of(report.nodeid)] += 1

    words = ["-q", "-p", "no:cacheprovider", "--show-capture=no", "-m", "not processes"]
    status = pytest.main([*words, "-k", SELECTED, *COMPILED, *EAGER], plugins=[Counter()])
    why = unavailable("cpu")
    found = {"torch": torch.__version__, "cpp": why or cpu_rows.isa(), "live": why is None}
    path.write_text(json.dumps(found | {"passed": passed, "failed": failed}), encoding="utf-8")
    return int(status)


def kind_of(test: str) -> str:
    if not test.startswith(tuple(COMPILED)):
        return "eager"
    return next(kind for kind, words in KINDS.items() if any(word in test for word in words))


def environment(folder: Path | None) -> dict[str, str]:
    """In which a new process finds the folder's torch before the installed one, and no GPU."""
    paths = [] if folder is None else [str(folder.resolve())]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def version_of(folder: Path) -> list[int]:
    """By its name, torch-2.10.0."""
    return [int(part) for part in folder.resolve().name.removeprefix("torch-").split(".")]


def print_table(lines: list[Line]) -> None:
    print(f"\n{'torch':13} " + " ".join(f"{kind:>9}" for kind in KINDS) + "  C++ rows")
    for line in lines:
        notes = f"  {line.failed} FAILED" if line.failed else ""
        if line.asked not in (None, line.torch.split("+")[0]):
            notes += f"  WRONG: {line.asked} was asked for"
        counts = " ".join(f"{line.passed[kind]:9}" for kind in KINDS)
        print(f"{line.torch:13} {counts}  {line.cpp}{notes}")


def write(path: Path, lines: list[Line]) -> None:
    from benchmarks.stamp import commit

    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    columns = ["torch", *KINDS, "failed", "cpp", "commit", "date"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            row = {"torch": line.torch, "failed": line.failed, "cpp": line.cpp} | line.passed
            writer.writerow(row | about)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="each with another torch, named torch-VERSION")
    add("--no-installed", dest="installed", action="store_false", help="leave that one out")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="test runs at a time")
    add("--csv", type=Path, help="write the table here as well, with commit and date")
    add("--count-tests", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if (counting := parse().count_tests) is not None:
        sys.exit(count_tests(counting))
    sys.exit(main())
