"""The kernels with every Triton that is promised: what compiles, and what computes rightly.

    make matrix                                                 # fetches the older ones first
    python tools/matrix.py .venv/triton-3.4.0 .venv/triton-3.6.0

Each folder holds a Triton, as `pip install --no-deps --target FOLDER triton==...` leaves it; the
one that is installed comes last. With each of them compile_kernels.py runs in a process that finds
it first, and the row tests in Triton's interpreter in another. The table shows the versions that
these processes imported and what they counted. Exit status 1 if a kernel has a fault, a test
failed, none ran, or another Triton than that of the folder was imported.

With the installed Triton everything is compiled, with the others a sample for sm_90 (--wide:
everything; Triton 3.4 links for AMD only where ROCm's linker is installed).
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from tools.kernel_report import SHARED_LIMIT

ROOT = Path(__file__).resolve().parents[1]
# Those that run the kernels, and those that say what the interpreter they run in is worth.
TESTS = [f"tests/kernels/rows/test_{name}.py" for name in ("rows", "row_settings", "row_faults")]
TESTS += [f"tests/kernels/rows/test_{name}.py" for name in ("triton_rows", "interpret")]
TESTS += ["tests/kernels/rows/test_interpret_bfloat16.py"]
SELECTED = "triton or interpret or row_faults"  # in their names; the other back-ends' are left out
# By the metadata of torch's wheels for Linux.
SHIPPED_BY = {"3.4": "2.8", "3.5": "2.9", "3.6": "2.10, 2.11", "3.7": "2.12, 2.13"}


@dataclass
class Line:
    """What one Triton did. `asked` is the folder's version, None for the installed one."""

    asked: str | None
    triton: str
    variants: int = 0
    targets: str = ""
    faults: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def torch(self) -> str:
        return SHIPPED_BY.get(".".join(self.triton.split(".")[:2]), "-")

    @property
    def right(self) -> bool:
        found = self.asked in (None, self.triton)
        compiles = self.variants > 0 and self.faults == 0
        return found and compiles and self.passed > 0 and self.failed == 0


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    started = time.perf_counter()
    folders = [*args.folders, None]
    lines = []
    for folder in folders:
        lines.append(compiled(folder, choice(folder, args.wide)))
    with ThreadPoolExecutor(args.jobs) as pool:
        for line, counts in zip(lines, pool.map(interpreted, folders), strict=True):
            if counts.pop("triton") != line.triton:
                raise SystemExit(f"compiled with triton {line.triton}, tested with another one")
            vars(line).update(counts)
    print_table(lines)
    if args.csv:
        write(args.csv, lines)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(line.right for line in lines) else 1


def choice(folder: Path | None, wide: bool) -> list[str]:
    """Which cases and targets, in the words of compile_kernels.py."""
    if folder is None:
        return []
    if not wide:
        return ["--quick", "--target", "sm_90"]
    if version_of(folder).startswith("3.4.") and not Path("/opt/rocm/llvm/bin/ld.lld").exists():
        return ["--target", *(x for x in SHARED_LIMIT if x.startswith("sm_"))]  # it has no linker
    return []


def compiled(folder: Path | None, words: list[str]) -> Line:
    """compile_kernels.py with the folder's Triton; its words go where ours go."""
    asked = None if folder is None else version_of(folder)
    print(f"--- triton {asked or 'as installed'}: compile_kernels.py {' '.join(words)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "variants.csv")
        command = [sys.executable, ROOT / "tools/compile_kernels.py", *words]
        done = subprocess.run([*command, "--csv", results], cwd=ROOT, env=environment(folder))
        if not results.exists():
            raise SystemExit(f"compile_kernels.py ended with status {done.returncode}")
        with results.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    faults = sum(bool(row["faults"]) for row in rows)
    if (faults > 0) != (done.returncode != 0):
        raise SystemExit(f"{faults} variants with faults, but status {done.returncode}")
    targets = " ".join(sorted({row["target"] for row in rows}))
    return Line(asked, rows[0]["triton"], len(rows), targets, faults)


def interpreted(folder: Path | None) -> dict:
    """What pytest counted with the folder's Triton, and the version of that."""
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch, "counts.json")
        command = [sys.executable, __file__, "--count-tests", counts]
        there = environment(folder) | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
        if not counts.exists():
            raise SystemExit(done.stdout + done.stderr)
        found = json.loads(counts.read_text(encoding="utf-8"))
    if done.returncode != 0:
        print(done.stdout)
        found["failed"] = max(found["failed"], 1)
    return found


def count_tests(path: Path) -> int:
    """Runs the tests in this process, and writes down what came of them."""
    import pytest

    counts = {"passed": 0, "failed": 0, "skipped": 0}

    class Counter:
        def pytest_runtest_logreport(self, report) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1

    words = ["-q", "-p", "no:cacheprovider", "-k", SELECTED, *TESTS]
    status = pytest.main(words, plugins=[Counter()])
    import triton  # after the tests: the one that they ran with

    path.write_text(json.dumps(counts | {"triton": triton.__version__}), encoding="utf-8")
    return int(status)


def environment(folder: Path | None) -> dict[str, str]:
    """In which a new process finds the folder's Triton before the installed one."""
    dropped = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    found = {name: value for name, value in os.environ.items() if name not in dropped}
    paths = [] if folder is None else [str(folder.resolve())]
    return found | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}


def version_of(folder: Path) -> str:
    """By the metadata that pip put beside the package."""
    found = sorted(folder.glob("triton-*.dist-info"))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one triton-*.dist-info in it, found {len(found)}")
    return found[0].name.removeprefix("triton-").removesuffix(".dist-info")


def print_table(lines: list[Line]) -> None:
    print(
        f"\n{'triton':8} {'torch':11} {'variants':>8} {'faults':>6} {'tests passed':>12}  targets"
    )
    for line in lines:
        notes = f"  {line.failed} FAILED" if line.failed else ""
        if line.asked not in (None, line.triton):
            notes += f"  WRONG: {line.asked} was asked for"
        print(
            f"{line.triton:8} {line.torch:11} {line.variants:8} {line.faults:6} {line.passed:12}  "
            f"{line.targets}{notes}"
        )


def write(path: Path, lines: list[Line]) -> None:
    from benchmarks.stamp import commit

    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    columns = ["triton", "torch", "variants", "targets", "faults", "passed", "failed", "skipped"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "commit", "date"], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            row = {column: getattr(line, column) for column in columns}
            writer.writerow(row | about)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help="each with an older Triton")
    add("--wide", action="store_true", help="all cases and targets with every Triton")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="test runs at a time")
    add("--csv", type=Path, help="write the table here as well, with commit and date")
    add("--count-tests", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if (counting := parse().count_tests) is not None:
        sys.exit(count_tests(counting))
    sys.exit(main())
