"""What the gate saves: seconds and teacher tokens of one training update, by gate rate.

    python benchmarks/bench_gate.py                          # the table of README; minutes
    python benchmarks/bench_gate.py --csv gate.csv --plot gate.png
    python benchmarks/bench_gate.py --teacher 512,12 --vocab 32768 --rate 1 0.25

An update is `kepo_step`, forward and backward, over the micro-batches of a step, teacher included
and optimiser not, on random Qwen3-VL models and scanned digits. Three ways to the same gradient:

    open      as we train: the teacher's backbone and head meet the open sequences only
    states    its backbone runs on every sequence, its head on the open ones
    whole     backbone and head run on every sequence, and the gate is a weight in the loss

Before anything is timed, the three must agree on loss and gradients and must have shown the teacher
as many tokens as they say. All are timed in turn, round after round; `x whole` is the time over
that of `whole` at the same gate rate, taken within a round; [p20 p80] are quantiles over rounds.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import table
from bench_loss import progress
from gate_problem import HEAD_SIZE, Problem, Size, build, parameters
from measure import PEERS, Measurement, Quantiles, stamp, time_in_turn, watched

from kepo.batch import Batch
from kepo.reading import own_progress_only
from kepo.step import StepTotals, kepo_step

CPU = torch.device("cpu")
UNFELT = 1e-20  # a weight next to which the others, about 1e-3, round to themselves
TOLERANCE = 5e-6  # relative, of loss and gradient: fp32, in matrix products of other shapes
COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", "transformers", "commit", "date"),
    *("student_parameters", "teacher_parameters", "V", "completions", "prompt_tokens"),
    *("completion_tokens", "micro_batch", "gate_rate", "way", "teacher_tokens"),
    *("seconds", "seconds_p20", "seconds_p80", "x_whole", "x_whole_p20", "x_whole_p80"),
    *("peak_mib", "rounds"),
)

Key = tuple[float, str]  # gate rate and way


class Update(NamedTuple):
    """What one update left behind."""

    loss: float
    gradient: Tensor
    teacher_tokens: int
    """Completion tokens that the teacher's backbone was given."""


# ---- three ways to one gradient ----


def as_it_is(batch: Batch) -> Batch:
    return batch


def all_states(batch: Batch) -> Batch:
    """Every gate open, the weights of closed sequences still 0: the loss drops those rows."""
    return replace(batch, gate=torch.ones_like(batch.gate))


def everything(batch: Batch) -> Batch:
    """Every gate open and no weight 0: the loss computes rows that nobody feels."""
    weights = batch.distill_weights.clamp(min=UNFELT) * batch.completion_mask
    return replace(all_states(batch), distill_weights=weights)


WAYS: dict[str, Callable[[Batch], Batch]] = {
    "open": as_it_is,
    "states": all_states,
    "whole": everything,
}


def update(problem: Problem, micros: list[Batch]) -> float:
    """Gradients of one step, in the student's parameters; returns the loss."""
    problem.policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for micro in micros:
        loss, _ = kepo_step(
            problem.policy, problem.teacher, None, micro, problem.config, StepTotals()
        )
        loss.backward()
        total += float(loss.detach())
    return total


def micros_of(problem: Problem, rate: float, way: str) -> list[Batch]:
    return WAYS[way](problem.batches[rate]).split(problem.config.micro_batch)


# ---- before anything is timed ----


def observed(problem: Problem, micros: list[Batch]) -> Update:
    problem.seen.clear()
    loss = update(problem, micros)
    gradients = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in problem.policy.model.parameters()
    ]
    return Update(loss, torch.cat(gradients), sum(problem.seen))


def check_ways(problem: Problem, rate: float) -> dict[str, int]:
    """Teacher tokens of each way; SystemExit where one differs in loss, gradient or those."""
    found = {way: observed(problem, micros_of(problem, rate, way)) for way in WAYS}
    batch, truth = problem.batches[rate], found["whole"]
    for way, mine in found.items():
        gap = float((mine.gradient - truth.gradient).norm() / truth.gradient.norm())
        # The policy term is the mean of advantages, 0 up to rounding: its loss has no scale.
        same = math.isclose(mine.loss, truth.loss, rel_tol=TOLERANCE, abs_tol=1e-6)
        if not same or not gap <= TOLERANCE:
            raise SystemExit(
                f"error: at gate rate {rate:g} {way} has the loss {mine.loss:.7g} and gradients "
                f"off by {gap:.1e}, whole the loss {truth.loss:.7g}; expected the same"
            )
        shown = batch.completion_mask if way != "open" else batch.completion_mask[batch.gate > 0]
        if mine.teacher_tokens != int(shown.sum()):
            raise SystemExit(
                f"error: at gate rate {rate:g} {way} gave the teacher {mine.teacher_tokens} "
                f"completion tokens; expected {int(shown.sum())}"
            )
    return {way: mine.teacher_tokens for way, mine in found.items()}


# ---- measuring and showing ----


def bench(problem: Problem, rounds: int) -> list[table.Row]:
    """One row for each gate rate and way."""
    tokens: dict[Key, int] = {}
    calls: dict[Key, Callable[[], object]] = {}
    measured: dict[Key, Measurement] = {}
    for rate in problem.batches:
        progress(f"checking gate rate {rate:g}")
        for way, count in check_ways(problem, rate).items():
            tokens[rate, way] = count
            calls[rate, way] = partial(update, problem, micros_of(problem, rate, way))
    for key, call in calls.items():
        progress(f"first call: gate rate {key[0]:g}, {key[1]}")
        measured[key] = watched(call, CPU)
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}")
        time_in_turn(calls, measured, CPU)
    progress("")
    return [
        {
            "gate_rate": rate,
            "way": way,
            "teacher_tokens": tokens[rate, way],
            **spread("seconds", result.seconds),
            **spread("x_whole", result.over([measured[rate, "whole"]])),
            "peak_mib": result.peak_mib,
            "rounds": result.rounds,
        }
        for (rate, way), result in measured.items()
    ]


def spread(name: str, values: Quantiles) -> table.Row:
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))


def facts_of(problem: Problem) -> table.Row:
    (some, *_) = problem.batches.values()
    return {
        "student_parameters": parameters(problem.policy),
        "teacher_parameters": parameters(problem.teacher),
        "V": len(problem.policy.lm_head),
        "completions": len(some),
        "prompt_tokens": problem.prompt_tokens,
        "completion_tokens": int(some.completion_mask.sum()),
        "micro_batch": problem.config.micro_batch,
    }


def print_table(rows: list[table.Row]) -> None:
    print(
        f"\n{'gate rate':>9}  {'way':7} {'teacher tokens':>14} {'seconds':>8} {'[p20 p80]':>13}",
        end="",
    )
    print(f" {'x whole':>8} {'[p20 p80]':>13}")  # fmt: skip
    for row in rows:
        seconds, ratio = (
            "{:8.2f} {:>13}".format(
                row[name], f"[{row[name + '_p20']:.2f} {row[name + '_p80']:.2f}]"
            )
            for name in ("seconds", "x_whole")
        )
        print(
            f"{row['gate_rate']:9g}  {row['way']:7} {row['teacher_tokens']:14d} {seconds} {ratio}"
        )


def plot(rows: list[table.Row], picture: Path) -> None:
    """Seconds of an update, one group of bars for each gate rate, the teacher's tokens above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    colours = dict(zip(WAYS, ("#c0392b", "#2980b9", "#7f8c8d"), strict=True))
    rates = list(dict.fromkeys(row["gate_rate"] for row in rows))
    for row in rows:
        place = rates.index(row["gate_rate"]) * (len(WAYS) + 1) + list(WAYS).index(row["way"])
        middle, low, high = (row[f"seconds{part}"] for part in ("", "_p20", "_p80"))
        axis.bar(place, middle, 0.9, color=colours[row["way"]])
        axis.errorbar(place, middle, [[middle - low], [high - middle]], color="black", linewidth=1)
        axis.text(place, high, row["teacher_tokens"], ha="center", va="bottom", size=7)
    centres = [place * (len(WAYS) + 1) + (len(WAYS) - 1) / 2 for place in range(len(rates))]
    axis.set_xticks(centres, [f"gate rate {rate:g}" for rate in rates])
    axis.set_ylabel("seconds per update; teacher tokens above")
    axis.set_title(
        "{machine} ({capability}), {threads} threads, torch {torch}".format(**rows[0]),
        size=8,
        loc="left",
    )
    patches = [plt.Rectangle((0, 0), 1, 1, color=colours[way]) for way in WAYS]
    figure.legend(patches, list(WAYS), loc="outside lower center", ncols=len(WAYS))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


# ---- the command ----


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    own_progress_only()
    environment = {key: value for key, value in stamp().items() if key not in PEERS}
    import transformers

    environment["transformers"] = transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        progress("building the problem")
        problem = build(Path(folder), args)
        progress("")
        facts = environment | facts_of(problem)
        print("\n".join(f"{name:18} {value}" for name, value in facts.items()))
        rows = [facts | row for row in bench(problem, args.rounds)]
    print_table(rows)
    if args.csv:
        table.write(args.csv, rows, COLUMNS)
        print(f"\nwritten: {args.csv}")
    if args.plot:
        plot(rows, args.plot)
        print(f"written: {args.plot}")


def parse_size(text: str) -> Size:
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HIDDEN,LAYERS") from error
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
    add("--rate", type=float, nargs="+", default=[1.0, 0.5, 0.1, 0.0], help="gate rates")
    add("--student", type=parse_size, default="192,4", help="HIDDEN,LAYERS (default 192,4)")
    add("--teacher", type=parse_size, default="384,8", help="HIDDEN,LAYERS (default 384,8)")
    add("--vocab", type=int, default=8192, help="rows of both heads (default 8192)")
    add("--prompts", type=int, default=5, help="questions of a step (default 5)")
    add("--generations", type=int, default=8, help="completions of each (default 8)")
    add("--tokens", type=int, default=48, help="per completion (default 48)")
    add("--micro-batch", type=int, default=20, help="completions at once (default 20)")
    add("--rounds", type=int, default=5, help="timed calls of each (default 5)")
    add("--seed", type=int, default=0, help="of models, completions and gates (default 0)")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    add("--plot", type=Path, help="draw them here")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    check_problem(parser, args)
    return args


def check_problem(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses sizes and gate rates that make no problem; a rate given twice counts once."""
    for name in ("prompts", "tokens", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.generations < 2:
        parser.error(f"--generations {args.generations}: expected at least 2, a group")
    if args.vocab < 512:
        parser.error(
            f"--vocab {args.vocab}: expected at least 512, the tokenizer's own and padding"
        )
    count = args.prompts * args.generations
    for rate in args.rate:
        if not 0 <= rate <= 1 or abs(rate * count - round(rate * count)) > 1e-6:
            parser.error(f"--rate {rate:g}: expected a whole number of {count} completions")
    args.rate = list(dict.fromkeys(args.rate))


if __name__ == "__main__":
    main()
