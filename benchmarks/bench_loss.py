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

from measure import Measurement, ratio_of, stamp, time_each, warm_up
from providers import CASES, PROVIDERS, Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PEERS = ("liger", "eager")
PROBE_ROWS = 16

Key = tuple[str, str]  # case and provider


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
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {args.json}")


def bench(problem: Problem, device: torch.device, args: argparse.Namespace) -> list[dict]:
    """One row per case and provider.

    All calls are timed in turn, round after round, so that a machine that slows down slows all of
    them, and ratios are medians of the ratios within a round.
    """
    measured: dict[Key, Measurement] = {}
    scales: dict[Key, float] = {}
    calls = {}
    for case in CASES:
        for name in args.providers:
            call = PROVIDERS[name](problem, case)
            if call is None:
                continue
            key = case, name
            print(f"  warming up: {case} {name}".ljust(40), end="\r", flush=True)
            scales[key] = 1
            if name in PEERS and problem.rows > PROBE_ROWS:
                small = problem.first_rows(PROBE_ROWS)
                probe = warm_up(PROVIDERS[name](small, case), device)
                if probe.first * problem.rows / small.rows > args.max_seconds:
                    measured[key], scales[key] = probe, problem.rows / small.rows
                    continue
            measured[key], calls[key] = warm_up(call, device), call
    for round in range(args.repeats):
        print(f"  round {round + 1} of {args.repeats}".ljust(40), end="\r", flush=True)
        time_each(calls, measured, device)
    return report(problem, measured, scales, args.providers)


def report(
    problem: Problem,
    measured: dict[Key, Measurement],
    scales: dict[Key, float],
    providers: list[str],
) -> list[dict]:
    """Print the table and the ratios the project promises; returns the table's rows."""
    print(f"{'case':9} {'provider':9} {'seconds':>9} {'x floor':>8} {'peak MiB':>9}  note")
    rows = []
    for case in CASES:
        for name in providers:
            if (case, name) not in measured:
                why = "not installed, or has no such loss"
                print(f"{case:9} {name:9} {'-':>9} {'-':>8} {'-':>9}  {why}")
                continue
            result, scale = measured[case, name], scales[case, name]
            ratio = scale * ratio_of(result, [measured.get((case, "floor"))])
            few = problem.rows / scale
            note = "" if scale == 1 else f"time scaled from {few:.0f} rows; memory of those rows"
            seconds = result.seconds * scale
            print(f"{case:9} {name:9} {seconds:9.3f} {ratio:8.2f} {result.peak_mib:9.0f}  {note}")
            rows.append(
                {
                    "case": case,
                    "provider": name,
                    "seconds": seconds,
                    "x_floor": ratio,
                    "peak_mib": result.peak_mib,
                    "repeats": max(1, len(result.times)),
                    "note": note,
                }
            )
    print()
    ours = {case: measured.get((case, "ours")) for case in CASES}
    promises = [
        ("gated KD, all open / its GEMMs", "kd_open", [measured.get(("kd_open", "floor"))]),
        ("gated KD, half open / all open", "kd_half", [ours["kd_open"]]),
        ("joint / GRPO + gated KD one after the other", "joint", [ours["grpo"], ours["kd_half"]]),
    ]
    for title, case, over in promises:
        if ours[case]:
            print(f"{title:52} {ratio_of(ours[case], over):6.2f}")
    for peer in PEERS:
        if ours["kd_open"] and ("kd_open", peer) in measured:
            times = scales["kd_open", peer] * measured["kd_open", peer].seconds
            print(
                f"{f'gated KD, all open: {peer} / ours':52} {times / ours['kd_open'].seconds:6.2f}"
            )
    return rows


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
