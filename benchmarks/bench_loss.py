"""Time and peak memory of the fused losses against the bare GEMMs and against other libraries.

    python benchmarks/bench_loss.py                          # what README promises; minutes
    python benchmarks/bench_loss.py --shape design --dtype float32 --csv results.csv
    python benchmarks/bench_loss.py --shape 8192,2048,5120,151936 --device cuda
    python benchmarks/bench_loss.py --shape qwen3vl-8b-32b --provider floor ours
    python benchmarks/bench_loss.py --shape real             # rows of SmolLM2; extra `real`

Every number is of forward and backward together, gradients of hidden states and head included.
`x floor` is the time over that of the bare matrix products of our loss, in chunks of the length at
which those are fastest, found before the rounds. All calls of one table are timed in turn, round
after round, and ratios are taken within a round; [p20 p80] are quantiles over the rounds.

Peers get the problem in the dtype that suits them: on a CPU without bf16 instructions in float32,
on one with them in the dtype in which their first call was faster, on a GPU in ours. The copies are
made before anything is timed. A peer that would take too long is measured on fewer rows and scaled,
one that has no such loss is named with the reason. A peer that compiles is first tried in a process
of its own, and named if it crashes or hangs there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from benchmarks.losses import table
from benchmarks.losses.floor import fastest, floor
from benchmarks.losses.losses_of_ours import (
    CASES,
    GradientCall,
    NotComparable,
    ours,
)
from benchmarks.losses.measure import (
    Call,
    Measurement,
    estimated,
    time_in_turn,
    timed,
    watched,
)
from benchmarks.losses.peers import COMPILING, PEERS, dtypes
from benchmarks.losses.problems import ALL, FAMILIES, SHAPES, Problem, Shape, parse_shapes
from benchmarks.losses.survival import FEW, must_survive
from benchmarks.losses.tolerance import kl_bias, tolerance
from benchmarks.stamp import stamp

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MORE_TOLERANCES = (1e-3, 1e-2)  # beside --grad-tol, on the rows of a real model
DEFAULT_SHAPES = ("design", "joint", "peaked", "memory")

Key = tuple[str, str]  # case and provider
Prepared = tuple[Call | None, Measurement]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    environment = stamp()
    print("\n".join(f"{name:18} {value}" for name, value in environment.items()))
    rows: list[table.Row] = []
    for shape in args.shape:
        rows += [environment | row for row in bench(shape, args)]
        if args.csv:  # after each table: an interrupted run keeps those before it
            table.write(args.csv, rows)
    print_promises([row for row in rows if str(row["case"]).startswith("ratio:")])
    if args.csv:
        print(f"\nwritten: {args.csv}")


def bench(shape: Shape, args: argparse.Namespace) -> list[table.Row]:
    """One table: its rows, and the ratios that can be formed from it."""
    device, dtype = torch.device(args.device), args.dtype
    dtype = dtype or ("float32" if shape.once else "bfloat16")
    asked = {case: args.provider or shape.cases.get(case, ALL) for case in args.case or shape.cases}
    rounds = 0 if shape.once else args.rounds
    progress("building the problem")
    problem = Problem.make(shape, DTYPES[dtype], device)
    progress("")
    title = f"{shape.name}: N={problem.rows} H={shape.hidden} Ht={shape.teacher_hidden} "
    title += f"V={shape.vocab} {dtype} on {device}, mean entropy {problem.entropy:.2f} nat"
    print(f"\n{title}\n{'-' * len(title)}")

    measured: dict[Key, Measurement] = {}
    absent: dict[Key, str] = {}
    calls: dict[Key, Call] = {}
    in_dtype = cache(problem.cast)
    keys = [(case, name) for case, providers in asked.items() for name in providers]
    for key in keys:
        progress(f"first call: {' '.join(key)}")
        try:
            call, measured[key] = first_calls(in_dtype, DTYPES[dtype], *key, shape, args)
        except NotComparable as reason:
            absent[key] = str(reason)
            continue
        if call:
            calls[key] = call
    errors = {
        case: tolerance(problem, case, args.grad_tol)
        for case in asked
        if case.endswith("_tol") and (case, "ours") in measured
    }
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}")
        time_in_turn(calls, measured, device)
    progress("")

    facts = {
        "shape": shape.name,
        "device": str(device),
        "dtype": dtype,
        "N": problem.rows,
        "H": shape.hidden,
        "Ht": shape.teacher_hidden,
        "V": shape.vocab,
        "entropy": problem.entropy,
    }
    print(f"{'case':10} {'provider':9} {'dtype':8} {'seconds':>8} {'x floor':>8} ", end="")
    print(f"{'[p20 p80]':>13} {'MiB':>7}  note")
    rows = []
    for case, name in keys:
        if (case, name) in absent:
            print(f"{case:10} {name:9} {'-':8} {'-':>8} {'-':>8} {'':13} {'-':>7}  ", end="")
            print(absent[case, name])
            continue
        row = table.measured_row(case, name, measured[case, name], measured.get((case, "floor")))
        if name == "ours" and case in errors:
            row["grad_error"] = max(errors[case].hidden, errors[case].lm_head)
            row["note"] = f"{errors[case].note} (grad_tol {args.grad_tol:g})"
        print_row(facts | row)
        rows.append(row)
    rows += table.promised_rows(shape.name, device.type, measured)
    rows += [row for case, error in errors.items() for row in error.rows(case)]
    if shape.temperature:
        rows += of_a_real_model(shape, device, errors, args.grad_tol)
    return [facts | row for row in rows]


def of_a_real_model(
    shape: Shape, device: torch.device, cases: Iterable[str], grad_tol: float
) -> list[table.Row]:
    """What tolerances leave out of a real model's gradients, and the bias of its KL: in float32,
    whose rounding hides neither."""
    progress("tolerances and bf16, against float32")
    problem = Problem.make(shape, torch.float32, device)
    rows = [
        row
        for case in cases
        for at in (grad_tol, *MORE_TOLERANCES)
        for row in tolerance(problem, case, at).rows(case, f"{at:g}")
    ]
    rows += kl_bias(problem)
    progress("")
    return [row | {"dtype": "float32"} for row in rows]


def first_calls(
    in_dtype: Callable[[torch.dtype], Problem],
    dtype: torch.dtype,
    case: str,
    name: str,
    shape: Shape,
    args: argparse.Namespace,
) -> Prepared:
    """The call to be timed in rounds, None if it is too slow for that, and what is known of it:
    a peer in the dtype in which it is fastest, the floor in the best chunks."""
    if name == "floor" and not shape.once:
        return fastest(in_dtype(dtype), case)
    if name not in PEERS:
        return prepare(in_dtype(dtype), case, name, shape, args)
    found: list[Prepared] = []
    for candidate in dtypes(dtype, torch.device(args.device), args.peer_dtype):
        try:
            call, result = prepare(in_dtype(candidate), case, name, shape, args)
            result = replace(result, dtype=str(candidate).removeprefix("torch."))
            found.append((call, result))
        except NotComparable as why:
            reason = why
    if not found:
        raise reason
    found.sort(key=lambda prepared: prepared[1].first)
    (call, result), *others = found
    others = [f"{other.first:.3g} s in {other.dtype}" for _, other in others]
    return call, replace(result, note="; ".join(filter(None, (result.note, *others))))


def prepare(
    problem: Problem, case: str, name: str, shape: Shape, args: argparse.Namespace
) -> Prepared:
    """The call and its measurement in the dtype of the problem.

    Everything runs on a few rows first: imports, compilation and thread pools belong to no call.
    """
    device, provider = problem.hidden.device, provider_of(name, args.grad_tol)

    def call_of(rows: int) -> Call:
        return provider(problem if rows >= problem.rows else problem.first_rows(rows), case)

    try:
        if name in COMPILING:
            call_of(FEW)  # what is absent needs no process to say so
            must_survive(provider, case, shape, problem.hidden.dtype, device)
        if name in PEERS and not shape.once:
            result = estimated(
                call_of,
                problem.rows,
                device,
                longest=args.max_seconds,
                compiles=name in COMPILING,
            )
            if result:
                return None, result
            if name in COMPILING:
                timed(call_of(problem.rows), device)
        else:
            timed(call_of(min(8, problem.rows)), device)
        call = call_of(problem.rows)
        result = watched(call, device)
        if name in PEERS and not shape.once and result.first > 2 * args.max_seconds:
            result.note = "slower than its calls on fewer rows promised: timed once"
            return None, result
        return call, result
    except NotComparable:
        raise
    except Exception as error:
        # A peer that fails is a fact about the peer. Ours must not, except for what it lacks.
        if name not in PEERS and "grad_tol" not in str(error):
            raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotComparable(f"fails here: {words[:70]}") from error


def provider_of(name: str, grad_tol: float) -> Callable[[Problem, str], Call | GradientCall]:
    return {"floor": floor, "ours": partial(ours, grad_tol=grad_tol), **PEERS}[name]


def print_row(row: table.Row) -> None:
    ratio, low, high = (row[name] for name in ("x_floor", "x_floor_p20", "x_floor_p80"))
    spread = f"[{low:.2f} {high:.2f}]" if row["rounds"] > 1 and ratio == ratio else ""
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    shown = "-" if ratio != ratio else f"{ratio:.2f}"
    print(
        f"{row['case']:10} {row['provider']:9} {row['dtype']:8} {row['seconds']:8.3f} {shown:>8} "
        f"{spread:>13} {peak:>7}  {row['note']}"
    )


def print_promises(rows: list[table.Row]) -> None:
    if not rows:
        return
    print(f"\n{'ratio':44} {'shape':14} {'found':>8} {'[p20 p80]':>13} {'target':>7}  met")
    for row in rows:
        found, low, high = (row[name] for name in ("ratio", "ratio_p20", "ratio_p80"))
        spread = "" if low == high else f"[{low:.2f} {high:.2f}]"
        target = "" if row["target"] is None else f"{row['target']:.2g}"
        case = str(row["case"])
        digits = (
            ".1e" if "error" in case or "kl_" in case else ".3f" if "columns" in case else ".2f"
        )
        shown = format(found, digits)
        print(
            f"{row['note']:44} {row['shape']:14} {shown:>8} {spread:>13} {target:>7}  {row['met']}"
        )


def progress(words: str) -> None:
    """One line that overwrites itself; where nobody watches, nothing."""
    if sys.stderr.isatty():
        print(f"\r  {words:60}\r", end="", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shape",
        type=parse_shapes,
        nargs="+",
        default=[[SHAPES[name] for name in DEFAULT_SHAPES]],
        metavar="SHAPE",
        help=f"N,H,Ht,V or one of {', '.join((*FAMILIES, *SHAPES))} "
        f"(default: {' '.join(DEFAULT_SHAPES)})",
    )
    add("--case", nargs="+", choices=CASES, help="default: those of the shape")
    add("--provider", nargs="+", choices=ALL, help="default: all, fewer at named shapes")
    add("--dtype", choices=DTYPES, help="of our inputs (default bfloat16; memory: float32)")
    add(
        "--peer-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the peers' inputs (default auto: what is fastest for them, see above)",
    )
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--rounds", type=int, default=5, help="timed calls of each (default 5)")
    add(
        "--max-seconds",
        type=float,
        default=6.0,
        help="a peer whose call would take longer is measured on fewer rows (default 6)",
    )
    add("--grad-tol", type=float, default=6e-4, help="of the cases .._tol (default 6e-4)")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    args = parser.parse_args(arguments)
    args.shape = [shape for several in args.shape for shape in several]
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    if args.max_seconds <= 0 or not 0 <= args.grad_tol < 1:
        parser.error("--max-seconds must be positive, --grad-tol in [0, 1)")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {error}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}, but torch sees no CUDA device")
    return args


if __name__ == "__main__":
    main()
