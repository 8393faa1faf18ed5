"""Time and peak memory of the fused losses against the bare GEMMs, Liger and torch eager.

    python benchmarks/bench_loss.py                    # forward + backward; minutes on two cores
    python benchmarks/bench_loss.py --shape 8192,2048,5120,151936 --device cuda --json results.json

`x floor` is the time over that of the GEMMs alone, over the same chunks through the same calls. A
provider that would take too long is measured on fewer rows and scaled; the table then says so.
Times of one table come from one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import Measurement, alternate, stamp, warm_up
from providers import CASES, PROVIDERS, Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROBE_ROWS = 16


def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch sees no CUDA device")
    environment = stamp()
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    results = []
    for shape in args.shape:
        n, h, teacher_h, vocab = shape
        print(
            f"\nN={n} H={h} Ht={teacher_h} V={vocab} {args.dtype} on {device}, forward + backward"
        )
        problem = Problem.make(shape, dtype, device)
        rows = bench(problem, device, args)
        results += [
            {
                "N": n,
                "H": h,
                "Ht": teacher_h,
                "V": vocab,
                "dtype": args.dtype,
                "device": str(device),
            }
            | row
            | environment
            for row in rows
        ]
        headline(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {args.json}")


def bench(problem: Problem, device: torch.device, args: argparse.Namespace) -> list[dict]:
    """One row per case and provider, printed as it comes."""
    print(f"{'case':9} {'provider':9} {'seconds':>9} {'x floor':>8} {'peak MiB':>9}  note")
    rows = []
    for case in CASES:
        measured, scales = measure_case(problem, case, device, args)
        floor = measured["floor"].seconds if "floor" in measured else float("nan")
        for name in args.providers:
            if name not in measured:
                why = "not installed, or has no such loss"
                print(f"{case:9} {name:9} {'-':>9} {'-':>8} {'-':>9}  {why}")
                continue
            result, scale = measured[name], scales[name]
            seconds = result.seconds * scale
            few = problem.rows / scale
            note = "" if scale == 1 else f"time scaled from {few:.0f} rows; memory of those rows"
            numbers = f"{seconds:9.3f} {seconds / floor:8.2f} {result.peak_mib:9.0f}"
            print(f"{case:9} {name:9} {numbers}  {note}", flush=True)
            rows.append(
                {
                    "case": case,
                    "provider": name,
                    "seconds": seconds,
                    "x_floor": seconds / floor,
                    "peak_mib": result.peak_mib,
                    "repeats": max(1, len(result.times)),
                    "note": note,
                }
            )
    return rows


def measure_case(
    problem: Problem, case: str, device: torch.device, args: argparse.Namespace
) -> tuple[dict[str, Measurement], dict[str, float]]:
    """Every provider's measurement, and by how much its time is to be scaled.

    A peer that a call on a few rows predicts to take more than ``args.max_seconds`` is measured by
    that call alone.
    """
    measured: dict[str, Measurement] = {}
    scales: dict[str, float] = {}
    calls = {}
    for name in args.providers:
        call = PROVIDERS[name](problem, case)
        if call is None:
            continue
        scales[name] = 1
        if name in ("liger", "eager") and problem.rows > PROBE_ROWS:
            small = problem.first_rows(PROBE_ROWS)
            probe = warm_up(PROVIDERS[name](small, case), device)
            if probe.first * problem.rows / small.rows > args.max_seconds:
                measured[name], scales[name] = probe, problem.rows / small.rows
                continue
        measured[name], calls[name] = warm_up(call, device), call
    alternate(calls, measured, device, args.repeats)
    return measured, scales


def headline(rows: list[dict]) -> None:
    """The ratios the project promises."""
    seconds = {(row["case"], row["provider"]): row["seconds"] for row in rows}

    def ratio(title: str, a: tuple[str, str], b: list[tuple[str, str]]) -> None:
        if a in seconds and all(key in seconds for key in b):
            print(f"{title:52} {seconds[a] / sum(seconds[key] for key in b):6.2f}")

    print()
    ratio("gated KD, all open / its GEMMs", ("kd_open", "ours"), [("kd_open", "floor")])
    ratio("gated KD, half open / all open", ("kd_half", "ours"), [("kd_open", "ours")])
    ratio(
        "joint loss / GRPO + gated KD one after the other",
        ("joint", "ours"),
        [("grpo", "ours"), ("kd_half", "ours")],
    )
    for peer in ("liger", "eager"):
        ratio(f"gated KD, all open: {peer} / ours", ("kd_open", peer), [("kd_open", "ours")])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        type=shape,
        nargs="+",
        default=[(1024, 1024, 2048, 32768)],
        metavar="N,H,Ht,V",
        help="rows, hidden size, teacher's hidden size, vocabulary (default 1024,1024,2048,32768)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all inputs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (default 5)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=10.0,
        help="a peer whose call would take longer is measured on a few rows (default 10)",
    )
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all"
    )
    parser.add_argument("--json", type=Path, help="write the rows, with machine and versions, here")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int, int, int]:
    try:
        n, h, teacher_h, vocab = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected N,H,Ht,V") from error
    if min(n, h, teacher_h, vocab) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected four positive numbers")
    return n, h, teacher_h, vocab


if __name__ == "__main__":
    main()
