"""Whole steps of the loop: seconds and memory of their phases, against other ways to the same
gradient.

    python benchmarks/loop/step.py                          # what a step holds; minutes
    python benchmarks/loop/step.py --gate 1 0.5 0.1 0       # what the gate saves; minutes
    python benchmarks/loop/step.py --device cuda            # a step at its real size; 90 seconds
    python benchmarks/loop/step.py --device cpu             # the same at toy size; seconds

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
counts it; on a GPU by tensors. `planned` is what `kepo.plan` says of the phase of a step of ours
with every gate open, and of that moment of the update for the teacher; on a CPU on top of what is
resident beside models and optimiser. `fused/it` is fused's number over that of the way, times
within a round. [p20 p80] are quantiles over rounds.

A phase that fails, does not fit into memory or into --seconds is a row that says so. Exit status 1
if one failed otherwise than for want of memory or time.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import picture
from measure import PEERS, Quantiles, stamp
from problem import HEAD_SIZE, Problem, Size, build, parameters
from update import WAYS, Bench, Mismatch, Taken, Update

from kepo.held import Machine
from kepo.known_models import KNOWN, known_model
from kepo.memory import moments
from kepo.reading import own_progress_only

SCENARIOS = {
    "memory": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "optimiser"], rounds=0,
        student="256,8", teacher="384,8", tied=True, vocab=151936, lora=0, checkpointing=False,
        picture="32,64", prompts=2, generations=8, tokens=192, micro_batch=8,
    ),
    "gate": dict(
        rival=["states", "everywhere"], phase=["update"], rounds=5,
        student="192,4", teacher="384,8", tied=False, vocab=8192, lora=0, checkpointing=False,
        picture="32,64", prompts=5, generations=8, tokens=48, micro_batch=20,
    ),
    "cuda": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "teacher", "optimiser", "rollout"],
        rounds=2, student="Qwen/Qwen3-VL-2B-Instruct", teacher="Qwen/Qwen3-VL-8B-Instruct",
        tied=True, vocab=151936, lora=32, checkpointing=True,
        picture="384,384", prompts=4, generations=8, tokens=128, micro_batch=32,
    ),
    "cpu": dict(
        gate=[1.0, 0.5], rival=["whole"], phase=["update", "teacher", "optimiser", "rollout"],
        rounds=1, student="64,2", teacher="128,2", tied=True, vocab=4096, lora=8,
        checkpointing=True, picture="64,64", prompts=2, generations=4, tokens=24, micro_batch=8,
    ),
}  # fmt: skip
"""What is measured where a command does not say otherwise."""
NEEDS = {"update": 6.0, "rollout": 15.0}  # seconds that must be left when one begins
COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", "transformers", "commit", "date"),
    *("device", "dtype", "student", "teacher", "student_parameters", "teacher_parameters"),
    *("lora_rank", "V", "completions", "prompt_tokens", "completion_tokens", "micro_batch"),
    *("gate_rate", "phase", "way", "teacher_tokens", "seconds", "seconds_p20", "seconds_p80"),
    *("rounds", "peak_mib", "held_mib", "above_mib", "planned_mib", "reserved_mib"),
    *("planned_reserve_mib", "loss", "gradient_norm", "gradient_gap"),
    *("x_seconds", "x_seconds_p20", "x_seconds_p80", "x_peak", "x_above", "note"),
)
Row = dict[str, object]
T = TypeVar("T")


class Report:
    """Rows, each printed and on disk as soon as it is known; what failed; what time is left."""

    def __init__(self, facts: Row, file: Path | None, ends: float) -> None:
        self.facts, self.file, self.ends = facts, file, ends
        self.rows: list[Row] = []
        self.failed = False
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(",".join(COLUMNS) + "\n")
        print(line(HEAD), flush=True)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, row: Row) -> None:
        row = self.facts | row
        self.rows.append(row)
        print(line(row), flush=True)
        if self.file is not None:
            with self.file.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writerow({name: text(value) for name, value in row.items()})

    def attempt(self, row: Row, needs: float, work: Callable[[], T]) -> T | None:
        """What it returns; None, and a row that says why, where it does not come to its end."""
        if self.left() < needs:
            self.add(row | {"note": "left out: the time is over"})
            return None
        try:
            return work()
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {error}"
        except Exception as error:
            self.failed = True
            if not isinstance(error, Mismatch):
                traceback.print_exc()
            note = f"{type(error).__name__}: {error}"
        self.add(row | {"note": note.splitlines()[0][:200]})
        return None


# ---- what is measured ----


def measured(bench: Bench, report: Report, planned: Row, args: argparse.Namespace) -> None:
    """The rows, those that matter most first."""
    for place, rate in enumerate(args.gate):
        updates = partial(Updates(bench, report, planned, rate).rows, args.phase, args.rounds)
        if place or "rollout" not in args.phase:
            updates(["fused", *args.rival])
            continue
        updates(["fused"])
        rollout(bench, report, planned)
        updates(args.rival)


def rollout(bench: Bench, report: Report, planned: Row) -> None:
    row: Row = {"phase": "rollout", "way": "transformers"}
    found = report.attempt(row, NEEDS["rollout"], bench.rollout)
    if found is not None:
        taken, tokens = found
        note = f"{tokens} tokens, {tokens / taken.seconds:.0f} a second"
        report.add(row | taken_row(taken, [], planned.get("rollout")) | {"note": note})


class Updates:
    """Those of one gate rate."""

    def __init__(self, bench: Bench, report: Report, planned: Row, rate: float) -> None:
        self.bench, self.report, self.planned, self.rate = bench, report, planned, rate
        self.found: dict[str, Update] = {}
        self.later: dict[str, list[Update]] = {}

    def rows(self, phases: list[str], rounds: int, ways: list[str]) -> None:
        gaps = {}
        for way in ways:
            gap = self._attempt(way, partial(self._first, way))
            if gap is not None:
                gaps[way] = gap
        for way in rounds * list(gaps):
            if self.report.left() > NEEDS["update"]:
                if not self.bench.gauge.cuda:
                    taken = self.found[way].phases["update"]
                    measure._settle(taken.peak_mib - taken.held_mib)
                again = self._attempt(way, partial(self.bench.update, self.rate, way))
                if again is not None:
                    self.later[way].append(again)
        for way, gap in gaps.items():
            for phase in ("update", "teacher", "optimiser"):
                # The rivals differ in the update, the losses not in what comes before and after.
                if phase in phases and (phase == "update" or way == "fused"):
                    self.report.add(self._row(way, phase, gap))

    def _attempt(self, way: str, work: Callable[[], T]) -> T | None:
        row: Row = {"gate_rate": self.rate, "phase": "update", "way": way}
        done = self.report.attempt(row, NEEDS["update"], work)
        if done is None:
            self.bench.clear()
        return done

    def _first(self, way: str) -> float:
        self.found[way], self.later[way] = self.bench.update(self.rate, way, first=True), []
        try:
            return self.bench.check(self.rate, self.found, way)
        except Mismatch:
            del self.found[way]
            raise

    def _row(self, way: str, phase: str, gap: float) -> Row:
        update, fused = self.found[way], self.found.get("fused")
        taken = update.phases[phase]
        times = [again.phases[phase].seconds for again in self.later[way]]
        plan = None if way == "whole" else self.planned.get(phase)
        row: Row = {"gate_rate": self.rate, "phase": phase, "way": way}
        row |= taken_row(taken, times, plan)
        if phase == "teacher":
            return row | {"teacher_tokens": update.teacher_tokens}
        if phase == "update":
            row |= {"teacher_tokens": update.teacher_tokens, "loss": update.loss}
            row |= {"gradient_norm": update.gradient_norm, "gradient_gap": gap}
        if way == "fused" or fused is None:
            return row
        ours = fused.phases[phase]
        theirs = [again.phases[phase].seconds for again in self.later["fused"]]
        pairs = list(zip(theirs, times, strict=False)) or [(ours.seconds, taken.seconds)]
        ratios = Quantiles.of([mine / other for mine, other in pairs])
        return (
            row
            | spread("x_seconds", ratios)
            | {
                "x_peak": ours.peak_mib / taken.peak_mib,
                "x_above": (ours.peak_mib - ours.held_mib) / (taken.peak_mib - taken.held_mib),
            }
        )


def taken_row(taken: Taken, times: list[float], planned: Row | None) -> Row:
    return {
        **spread("seconds", Quantiles.of(times or [taken.seconds])),
        "rounds": max(1, len(times)),
        "peak_mib": taken.peak_mib,
        "held_mib": taken.held_mib,
        "above_mib": taken.peak_mib - taken.held_mib,
        "reserved_mib": taken.reserved_mib,
        **(planned or {}),
    }


def spread(name: str, values: Quantiles) -> Row:
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))


def plan(bench: Bench) -> dict[str, Row]:
    """What the planner says of each phase; on a GPU its reserve, which no tensor holds, apart."""
    problem, device = bench.problem, bench.problem.policy.device
    cuda = device.type == "cuda"
    before = 0.0 if cuda else bench.gauge.settle() - bench.standing_mib()
    size = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    found = moments(problem.config, Machine(1, size, device.type), problem.prompts)
    found["teacher"] = [moment for moment in found["update"] if "teacher" in moment.name]
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
        **{key: value for key, value in stamp().items() if key not in PEERS},
        "transformers": transformers.__version__,
        "device": problem.config.device,
        "dtype": problem.config.dtype,
        "student": str(args.student),
        "teacher": str(args.teacher),
        "student_parameters": parameters(problem.policy),
        "teacher_parameters": parameters(problem.teacher),
        "lora_rank": args.lora,
        "V": len(problem.policy.lm_head),
        "completions": problem.completions,
        "prompt_tokens": problem.prompts.text_tokens + problem.prompts.image_tokens,
        "completion_tokens": tokens,
        "micro_batch": args.micro_batch,
    }


# ---- in words ----

HEAD = {
    **dict(gate_rate="gate", phase="phase", way="way", seconds="seconds", x_seconds="fused/it"),
    **dict(teacher_tokens="teacher tokens", peak_mib="peak MiB", held_mib="held", note="note"),
    **dict(planned_mib="planned", x_peak="fused/it", x_above="above", gradient_gap="gap"),
}


def line(row: Row) -> str:
    """A row of the table, or its head."""

    def cell(name: str, form: str, width: int) -> str:
        value = row.get(name)
        if not isinstance(value, str):
            value = "" if value is None or value != value else format(value, form)
        return value.rjust(width)

    def span(name: str) -> str:
        ends = [row.get(f"{name}_{part}") for part in ("p20", "p80")]
        words = "[p20 p80]" if row is HEAD else ""
        return (words if None in ends else "[{:.2f} {:.2f}]".format(*ends)).rjust(13)

    words = [cell("gate_rate", "g", 5), f"{row['phase']:9} {row.get('way', ''):12}"]
    words += [cell("seconds", ".3f", 8), span("seconds")]
    words += [cell("x_seconds", ".2f", 8), span("x_seconds"), cell("teacher_tokens", "d", 14)]
    words += [cell(name, ".0f", 8) for name in ("peak_mib", "held_mib", "planned_mib")]
    words += [cell("x_peak", ".3f", 8), cell("x_above", ".3f", 6), cell("gradient_gap", ".0e", 6)]
    return " ".join([*words, cell("note", "", 0)]).rstrip()


def text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    # As a command it has a limit, to which imports count.
    started = time.monotonic() - (time.process_time() if arguments is None else 0.0)
    args = parse(arguments)
    own_progress_only()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem = build(folder, args)
        facts = facts_of(problem, args)
        print("\n".join(f"{name:18} {value}" for name, value in facts.items()), end="\n\n")
        print(f"models made and read: {time.monotonic() - started:.1f} s")
        report, bench = Report(facts, args.csv, started + args.seconds), Bench(problem, folder)
        planned = report.attempt({"phase": "plan"}, 0.0, partial(plan, bench)) or {}
        measured(bench, report, planned, args)
    if args.csv:
        print(f"\nwritten: {args.csv}")
    if args.plot:
        picture.draw([row for row in report.rows if row["phase"] == "update"], args.plot)
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


def parse_picture(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(","))
    if min(height, width) < 32:
        raise ValueError
    return height, width


parse_picture.__name__ = "HEIGHT,WIDTH, 32 or more"  # what argparse calls it in its complaint


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    shape = "HIDDEN,LAYERS or the name of a released model"
    add("--device", choices=("cpu", "cuda"), help="measure all phases, on it: bf16 on cuda")
    add("--gate", type=float, nargs="+", metavar="RATE", help="shares of gates that are open")
    add("--rival", nargs="*", choices=list(WAYS)[1:], metavar="WAY", help="ways beside fused")
    add("--phase", nargs="+", choices=("update", "teacher", "optimiser", "rollout"))
    add("--student", type=parse_shape, help=shape)
    add("--teacher", type=parse_shape, help=shape)
    add("--lora", type=int, metavar="RANK", help="of adapters; 0 = all weights are trained")
    add("--vocab", type=int, help="rows of both heads, if the models are of no released shape")
    add("--picture", type=parse_picture, metavar="HEIGHT,WIDTH", help="of every prompt")
    add("--prompts", type=int, help="questions of a step")
    add("--generations", type=int, help="completions of each")
    add("--tokens", type=int, help="per completion")
    add("--micro-batch", type=int, help="completions at once")
    add("--rounds", type=int, help="timed calls of each way")
    add("--seed", type=int, default=0, help="of models, completions and gates (default 0)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    add("--plot", type=Path, help="draw the updates here")
    args = parser.parse_args(arguments)
    gate = args.gate is not None and "whole" not in (args.rival or ())
    parser.set_defaults(**SCENARIOS[args.device or ("gate" if gate else "memory")])
    args = parser.parse_args(arguments)
    check_problem(parser, args)
    return args


def check_problem(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses sizes and gate rates that make no problem; a rate given twice counts once."""
    for name, least in dict(prompts=1, tokens=1, micro_batch=1, rounds=0, lora=0).items():
        if getattr(args, name) < least:
            words = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{words}: expected at least {least}")
    if args.generations < 2:
        parser.error(f"--generations {args.generations}: expected at least 2, a group")
    if args.vocab < 512:
        parser.error(
            f"--vocab {args.vocab}: expected at least 512, the tokenizer's own and padding"
        )
    count = args.prompts * args.generations
    for rate in args.gate:
        if not 0 <= rate <= 1 or abs(rate * count - round(rate * count)) > 1e-6:
            parser.error(f"--gate {rate:g}: expected a whole number of {count} completions")
    args.gate = list(dict.fromkeys(args.gate))


if __name__ == "__main__":
    sys.exit(main())
