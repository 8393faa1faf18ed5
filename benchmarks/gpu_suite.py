"""The one command for a machine with a GPU: correctness first, then times, within minutes.

    python benchmarks/gpu_suite.py                       # all of it, 8 minutes at most
    python benchmarks/gpu_suite.py --only correct_bf16 losses_small
    python benchmarks/gpu_suite.py --dry-run             # the same code on the CPU, tiny sizes

Writes <out>/<gpu>_<date>.csv after every case and a .log of all that was printed. Exit status 0: no
check failed; 1: one did; 2: there is no GPU, or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_checks
import table
from gpu_checks import CHECKS
from gpu_timings import TIMINGS, Clock
from measure import stamp

COLUMNS = (*table.COLUMNS, "triton", "driver", "gb_per_s")
RESERVE = 20.0  # seconds a step may still take when the last one starts


class Log:
    """Prints, and keeps what it printed; flushed, so that an interrupted run has it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, words: str = "") -> None:
        print(words, flush=True)
        print(words, file=self.file, flush=True)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    if args.sanitized:
        gpu_checks.sanitized_step()
        return 0
    started = time.monotonic()

    def left() -> float:
        return args.seconds - (time.monotonic() - started)

    device = torch.device("cpu" if args.dry_run else "cuda")
    environment = stamp() | {"triton": triton_version(), "driver": nvidia_smi("driver_version")}
    machine = "dry-run" if args.dry_run else str(environment["machine"])
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    stem = args.out / f"{name}_{environment['date']}"
    log = Log(stem.with_suffix(".log"))
    log("command            " + " ".join([sys.executable, *sys.argv]))
    log("nvidia-smi         " + nvidia_smi("name,driver_version,memory.total,clocks.max.sm"))
    for key, value in environment.items():
        log(f"{key:18} {value}")

    log()
    verdicts = [run_check(check, device, left, log) for check in CHECKS if wanted(check, args)]
    rows: list[table.Row] = []
    log(f"\n{'case':13} {'provider':13} {'ms':>9} {'x floor':>8} {'GB/s':>7} {'MiB':>7}  note")
    for timing in TIMINGS:
        if not wanted(timing, args):
            continue
        if left() < RESERVE:
            log(f"{timing}: left out, the time is over")
            continue
        try:
            for row in TIMINGS[timing](Clock(device, left)):
                rows.append(environment | {"device": device.type} | row)
                log(line(row))
                table.write(stem.with_suffix(".csv"), rows, COLUMNS)
        except Exception as error:  # one shape that fails must not cost the others
            log(f"{timing}: {type(error).__name__}: {first_line(error)}")
            verdicts.append("FAIL")
        release(device)
    if not rows:
        table.write(stem.with_suffix(".csv"), rows, COLUMNS)
    summary(rows, log)
    passed, failed, skipped = (verdicts.count(word) for word in ("PASS", "FAIL", "SKIP"))
    log(f"\nwritten: {stem}.csv and .log, {time.monotonic() - started:.0f} s")
    log(f"{passed} checks passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def run_check(name: str, device: torch.device, left, log: Log) -> str:
    started = time.monotonic()
    try:
        if left() < RESERVE:
            raise gpu_checks.Skipped("left out: the time is over")
        verdict, detail = "PASS", CHECKS[name](device)
    except gpu_checks.Skipped as reason:
        verdict, detail = "SKIP", f"skipped: {reason}"
    except Exception as error:
        verdict, detail = "FAIL", f"{type(error).__name__}: {first_line(error)}"
    release(device)
    log(f"{verdict} {name:22} {detail} ({time.monotonic() - started:.1f} s)")
    return verdict


def release(device: torch.device) -> None:
    if device.type == "cuda":
        with suppress(RuntimeError):  # after an illegal access each call raises; keep the report
            torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def line(row: table.Row) -> str:
    def number(name: str, digits: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "-" if value is None or value != value else format(scale * value, digits)

    words = f"{row['case']:13} {row['provider']:13} {number('seconds', '.3f', 1e3):>9} "
    words += f"{number('x_floor', '.2f'):>8} {number('gb_per_s', '.1f'):>7} "
    words += f"{number('peak_mib', '.0f'):>7}  {row.get('note', '')}"
    if row.get("target"):
        words += f" target {row['target'] * 1e3:g} ms, met: {row['met']}"
    return words.rstrip()


def summary(rows: list[table.Row], log: Log) -> None:
    """Each provider's time over that of our own call of the same case and shape."""
    timed = {(r["shape"], r["case"], r["provider"]): r for r in rows if "shape" in r}
    log(f"\n{'shape':16} {'case':11} {'provider':13} {'x ours':>7}")
    for (shape, case, who), row in timed.items():
        mine = timed.get((shape, case, "ours"), {})
        if who != "ours" and row.get("seconds") and mine.get("seconds"):
            log(f"{shape:16} {case:11} {who:13} {row['seconds'] / mine['seconds']:7.2f}")


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "not found"
    return (done.stdout.strip().splitlines() or ["not found"])[0]


def wanted(name: str, args: argparse.Namespace) -> bool:
    return args.only is None or name in args.only


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [*CHECKS, *TIMINGS]
    add("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    add("--seconds", type=float, default=480.0, help="to end within (default 480)")
    add("--out", type=Path, default=Path(__file__).with_name("results"), metavar="DIR")
    add("--sanitized", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: expected a positive number")
    return args


if __name__ == "__main__":
    sys.exit(main())
