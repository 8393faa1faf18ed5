"""The phases of a step of the loop: seconds and memory, against other ways to the same gradient.

    python benchmarks/loop/phases.py                          # what a step holds; minutes
    python benchmarks/loop/phases.py --gate 1 0.5 0.1 0       # what the gate saves; minutes
    python benchmarks/loop/phases.py --device cuda            # a step at its real size; 90 seconds
    python benchmarks/loop/phases.py --device cpu             # the same at toy size; seconds

The models are random Qwen3-VL, loaded, sampled and updated by the loop's own functions. Phases:

    update      forward, teacher, loss and backward, over the micro-batches of a step
    teacher     its forwards in the update
    optimiser   clipping and AdamW
    rollout     sampling by transformers, of completions that do not end before their limit

Ways of an update; all but the first are rivals:

    fused       as we train: our losses, and the teacher meets the sequences whose gate is open
    whole       plain PyTorch on whole [tokens, vocabulary] matrices (whole.py)
    states      the teacher's backbone runs on every sequence, its head on the open ones
    everywhere  its backbone and head run on every sequence, and the gate is a weight in the loss

Before a way is timed it must have given fused's loss and gradients, and have shown the teacher as
many tokens as it says. Every way is run once, watched for memory, and then timed in turn, round
after round (without rounds, seconds are those of the first call). `peak` is the most that was held
at any moment: on a CPU all that was resident, interpreter and libraries among it, as the kernel
counts it; on a GPU by tensors. `planned` is what `kepo plan` says of the phase of a step of ours
with every gate open, and of that moment of the update for the teacher; on a CPU on top of what is
resident beside models and optimiser, without what libraries and the allocator come to keep.
`fused/it` is fused's number over that of the way, times within a round. [p20 p80] are quantiles
over rounds.

A phase that fails, does not fit into memory or into --seconds is a row that says so. Exit status 1
if one failed otherwise than for want of memory or time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.loop.problem import HEAD_SIZE, Problem, Size, build, parameters
from benchmarks.loop.report import Report, Row, draw
from benchmarks.loop.update import WAYS, Bench, Taken, Update
from benchmarks.losses.measure import Quantiles
from benchmarks.stamp import PACKAGES, stamp
from kepo.models.reading import hide_transformers_bars
from kepo.planner.known_models import KNOWN, known_model
from kepo.planner.memory import Setup, moments
from kepo.planner.standing import Machine

SCENARIOS = {
    "memory": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "optimiser"], rounds=0,
        student="256,8", teacher="384,8", tied=True, vocab=151936, lora=0, checkpointing=False,
        picture=(32, 64), prompts=2, generations=8, tokens=192, micro_batch=8,
    ),
    "gate": dict(
        rival=["states", "everywhere"], phase=["update"], rounds=5,
        student="192,4", teacher="384,8", tied=False, vocab=8192, lora=0, checkpointing=False,
        picture=(32, 64), prompts=5, generations=8, tokens=48, micro_batch=20,
    ),
    "cuda": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "teacher", "optimiser", "rollout"],
        rounds=2, student="Qwen/Qwen3-VL-2B-Instruct", teacher="Qwen/Qwen3-VL-8B-Instruct",
        tied=True, vocab=151936, lora=32, checkpointing=True,
        picture=(384, 384), prompts=4, generations=8, tokens=128, micro_batch=32,
    ),
    "cpu": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "teacher", "optimiser", "rollout"],
        rounds=1, student="64,2", teacher="128,2", tied=True, vocab=4096, lora=8,
        checkpointing=True, picture=(64, 64), prompts=2, generations=4, tokens=24, micro_batch=8,
    ),
}  # fmt: skip
"""What is measured where a command does not say otherwise."""
NEEDS = {"update": 6.0, "rollout": 15.0}  # seconds that must be left when one begins


# ---- what is measured ----


def measured(
    bench: Bench, report: Report, planned: dict[str, Row], args: argparse.Namespace
) -> None:
    """The rows, those that matter most first."""
    for rate in args.gate:
        seen: dict[str, list[Update]] = {}
        at_rate = partial(updates, bench, report, planned, args, rate, seen)
        if "rollout" in args.phase and rate == args.gate[0]:
            at_rate(["fused"])
            rollout(bench, report, planned)
            at_rate(args.rival)
        else:
            at_rate(["fused", *args.rival])


def rollout(bench: Bench, report: Report, planned: dict[str, Row]) -> None:
    row: Row = {"phase": "rollout", "way": "transformers"}
    found = report.attempt(row, NEEDS["rollout"], bench.rollout)
    if found is not None:
        taken, tokens = found
        note = f"{tokens} tokens, {tokens / taken.seconds:.0f} a second"
        report.add(row | taken_row([taken]) | planned.get("rollout", {}) | {"note": note})


def updates(
    bench: Bench,
    report: Report,
    planned: dict[str, Row],
    args: argparse.Namespace,
    rate: float,
    seen: dict[str, list[Update]],
    ways: list[str],
) -> None:
    """Those of one gate rate, which come to be ``seen``: first every way once, then in turn."""

    def attempt(way: str, work: Callable[[float, str], Update]) -> None:
        row: Row = {"gate_rate": rate, "phase": "update", "way": way}
        found = report.attempt(row, NEEDS["update"], partial(work, rate, way))
        if found is None:
            bench.clear()
        else:
            seen.setdefault(way, []).append(found)

    for way in ways:
        attempt(way, bench.first)
    for way in args.rounds * [way for way in ways if way in seen]:
        if report.left() > NEEDS["update"]:
            bench.gauge.warm(seen[way][0].phases["update"].above_mib)
            attempt(way, bench.update)
    for way in ways:
        for phase in ("update", "teacher", "optimiser"):
            # Only the update differs from way to way.
            if way in seen and phase in args.phase and (phase == "update" or way == "fused"):
                row = update_row(seen, way, phase, planned.get(phase, {}))
                report.add({"gate_rate": rate, "phase": phase, "way": way} | row)


def update_row(seen: dict[str, list[Update]], way: str, phase: str, plan: Row) -> Row:
    calls = [update.phases[phase] for update in seen[way]]
    row = taken_row(calls) | (plan if way != "whole" else {})  # the planner knows our losses
    if phase == "optimiser":
        return row
    first = seen[way][0]
    row["teacher_tokens"] = first.teacher_tokens
    if phase == "teacher":
        return row
    row |= {name: getattr(first, name) for name in ("loss", "gradient_norm", "gradient_gap")}
    if way == "fused" or "fused" not in seen:
        return row
    ours = [update.phases[phase] for update in seen["fused"]]
    pairs = list(zip(ours, calls, strict=False))
    ratios = [mine.seconds / its.seconds for mine, its in pairs[1:] or pairs]
    row |= spread("x_seconds", Quantiles.of(ratios))
    (mine, its), *_ = pairs
    row["x_peak"] = mine.peak_mib / its.peak_mib
    row["x_above"] = mine.above_mib / its.above_mib
    return row


def taken_row(calls: list[Taken]) -> Row:
    """Memory of the first call, seconds of those after it, if there are any."""
    times = [call.seconds for call in calls[1:] or calls]
    names = ("peak_mib", "held_mib", "above_mib", "reserved_mib")
    return {
        **spread("seconds", Quantiles.of(times)),
        "rounds": len(times),
        **{name: getattr(calls[0], name) for name in names},
    }


def spread(name: str, values: Quantiles) -> Row:
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))


def plan(bench: Bench) -> dict[str, Row]:
    """What the planner says of each phase; on a GPU its reserve, which no tensor holds, apart."""
    problem, device = bench.problem, bench.problem.policy.device
    cuda = device.type == "cuda"
    before = 0.0 if cuda else bench.gauge.settle() - bench.standing_mib()
    size = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    found = moments(Setup(problem.config, Machine(1, size, device.type), problem.prompts))
    # What is measured as an update is what the planner tells in two: the scoring before it, too.
    scoring = found.pop("scoring", [])
    found["update"] = [*scoring, *found["update"]]
    found["teacher"] = [moment for moment in scoring if "teacher" in moment.name]
    rows = {}
    for phase, each in found.items():
        held = max((moment.held for moment in each), key=lambda held: sum(held.values()))
        reserve = held["reserve"] if cuda else 0
        total = before + (sum(held.values()) - reserve) / 2**20
        rows[phase] = {"planned_mib": total, "planned_reserve_mib": reserve / 2**20}
    return rows


def facts_of(problem: Problem, args: argparse.Namespace) -> Row:
    import transformers

    tokens = problem.completions * problem.config.max_completion_length
    return {
        **{key: value for key, value in stamp().items() if key not in PACKAGES},
        "transformers": transformers.__version__,
        "device": problem.config.device,
        "dtype": problem.config.dtype,
        "student": str(args.student),
        "teacher": str(args.teacher),
        "student_parameters": parameters(problem.policy),
        "teacher_parameters": parameters(problem.teacher),
        "lora_rank": args.lora,
        "V": len(problem.policy.head.weight),
        "completions": problem.completions,
        "prompt_tokens": problem.prompts.text_tokens + problem.prompts.image_tokens,
        "completion_tokens": tokens,
        "micro_batch": args.micro_batch,
    }


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    # As a command it has a limit, to which imports count.
    started = time.monotonic() - (time.process_time() if arguments is None else 0.0)
    args = parse(arguments)
    hide_transformers_bars()
    with tempfile.TemporaryDirectory() as name:
        problem = build(Path(name), args)
        facts = facts_of(problem, args)
        print("\n".join(f"{name:18} {value}" for name, value in facts.items()), flush=True)
        print(f"\nmodels made: {time.monotonic() - started:.1f} s", flush=True)
        report, bench = Report(facts, args.csv, started + args.seconds), Bench(problem, Path(name))
        planned = report.attempt({"phase": "plan"}, 0.0, partial(plan, bench)) or {}
        measured(bench, report, planned, args)
    if args.csv:
        print(f"\nwritten: {args.csv}")
    if args.plot:
        draw([row for row in report.rows if row["phase"] == "update"], args.plot)
        print(f"written: {args.plot}")
    return 1 if report.failed else 0


def parse_shape(text: str) -> Size | str:
    if known_model(text) is not None:
        return text
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected HIDDEN,LAYERS or one of {', '.join(KNOWN)}"
        ) from error
    if size.layers < 1 or size.hidden < 1 or size.hidden % (2 * HEAD_SIZE):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected HIDDEN a multiple of {2 * HEAD_SIZE}, and at least one layer"
        )
    return size


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="measure all phases, on it: bf16 on cuda")
    add("--gate", type=float, nargs="+", metavar="RATE", help="shares of gates that are open")
    add("--rival", nargs="*", choices=list(WAYS)[1:], metavar="WAY", help="ways beside fused")
    for name in ("--student", "--teacher"):
        add(name, type=parse_shape, help="HIDDEN,LAYERS or the name of a released model")
    for name, words in {
        "--vocab": "rows of both heads, if the models are of no released shape",
        "--prompts": "questions of a step",
        "--generations": "completions of each",
        "--tokens": "per completion",
        "--micro-batch": "completions at once",
        "--rounds": "timed calls of each way",
    }.items():
        add(name, type=int, help=words)
    add("--seed", type=int, default=0, help="of models, completions and gates (default 0)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    add("--plot", type=Path, help="draw the updates here")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    gate = args.gate is not None and "whole" not in (args.rival or ())
    parser.set_defaults(**SCENARIOS[args.device or ("gate" if gate else "memory")])
    args = parser.parse_args(arguments)
    check_problem(parser, args)
    return args


def check_problem(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses sizes and gate rates that make no problem; a rate given twice counts once."""
    least_of = dict(prompts=1, tokens=1, micro_batch=1, rounds=0, generations=2, vocab=512)
    for name, least in least_of.items():
        if getattr(args, name) < least:
            words = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{words}: expected at least {least}")
    count = args.prompts * args.generations
    for rate in args.gate:
        if not 0 <= rate <= 1 or abs(rate * count - round(rate * count)) > 1e-6:
            parser.error(f"--gate {rate:g}: expected a whole number of {count} completions")
    args.gate = list(dict.fromkeys(args.gate))


if __name__ == "__main__":
    sys.exit(main())
