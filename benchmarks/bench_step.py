"""What fused losses save of a whole training step: the process's peak memory, against whole
matrices.

    python benchmarks/bench_step.py                          # the table of README; minutes
    python benchmarks/bench_step.py --csv step.csv --plot step.png
    python benchmarks/bench_step.py --student 512,8 --teacher 1024,8 --tokens 128

A step is what `kepo.train` does after sampling: `kepo_step`, forward and backward, over its
micro-batches, teacher included, then clipping and AdamW, on random Qwen3-VL models with tied heads
and scanned digits, in fp32. Two ways, the same but for the loss functions that `kepo.step` calls:

    fused     ours
    whole     plain PyTorch on whole [tokens, vocabulary] matrices (benchmarks/whole.py)

Each step runs in a process of its own. `peak` is the most that was resident in it at any moment of
the step, as the kernel counts it: interpreter, libraries, models, optimiser and all. `held` is what
was resident before the step, optimiser state included, and `above` is peak - held. Before memory is
compared, both must agree on the loss and on the gradient of every parameter. Seconds are those of
one step, not repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import table
import whole
from bench_gate import check_problem, facts_of, parse_size, update
from bench_loss import progress
from gate_problem import build
from measure import PEERS, stamp

import kepo.step
import kepo_kernels
from kepo.reading import own_progress_only
from kepo_kernels import pages

TOLERANCE = 1e-5  # relative, of loss and gradients: fp32, summed in another order
WAYS: dict[str, dict[str, Callable]] = {
    "fused": {
        "fused_kepo_loss": kepo_kernels.fused_kepo_loss,
        "fused_grpo_loss": kepo_kernels.fused_grpo_loss,
    },
    "whole": {"fused_kepo_loss": whole.kepo_loss, "fused_grpo_loss": whole.grpo_loss},
}
"""What each puts in place of the loss functions in `kepo.step`."""
COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", "transformers", "commit", "date"),
    *("student", "teacher", "student_parameters", "teacher_parameters", "V", "completions"),
    *("prompt_tokens", "completion_tokens", "micro_batch", "gate_rate", "way"),
    *("peak_mib", "held_mib", "above_mib", "seconds", "loss", "gradient_norm"),
    *("gradient_gap", "x_peak", "x_above"),
)


class Step(NamedTuple):
    """What one step took and left."""

    facts: table.Row
    peak_mib: float
    held_mib: float
    seconds: float
    loss: float
    gradient_norm: float

    @property
    def above_mib(self) -> float:
        return self.peak_mib - self.held_mib


# ---- in a process of its own ----


def measured(args: argparse.Namespace, rate: float, way: str, gradients: Path) -> Step:
    """One step; its gradients, clipped as the optimiser met them, go into a file."""
    own_progress_only()
    with tempfile.TemporaryDirectory() as folder:
        one_rate = argparse.Namespace(**{**vars(args), "rate": [rate]})
        problem = build(Path(folder), one_rate, tied=True)
        micros = problem.batches[rate].split(problem.config.micro_batch)
        parameters = dict(problem.policy.model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), lr=problem.config.lr)
        make_state(optimizer)
        held = fresh_peak()
        started = time.perf_counter()
        with mock.patch.multiple(kepo.step, **WAYS[way]):
            loss = update(problem, micros)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), problem.config.max_grad_norm)
        optimizer.step()
        seconds = time.perf_counter() - started
        peak = resident("VmHWM")
    torch.save({name: p.grad for name, p in parameters.items()}, gradients)
    return Step(facts_of(problem), peak, held, seconds, loss, float(norm))


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's state, as earlier steps leave it; gradients of 0 move nothing."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fresh_peak() -> float:
    """Give back what is free and let the kernel count the peak anew; returns what is resident."""
    gc.collect()
    pages.release()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise SystemExit(f"error: this benchmark needs Linux and its /proc: {error}") from error
    return resident("VmRSS")


def resident(what: str) -> float:
    """VmRSS, memory of this process now, or VmHWM, its highest so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def in_fresh_process(work: Callable[..., Step], *arguments: object) -> Step:
    """``work`` in a new interpreter, in which nothing was allocated before."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(work, *arguments).result()
    except BrokenProcessPool as error:
        raise SystemExit("error: a step was killed, likely for want of memory") from error


# ---- comparing and showing ----


def bench(args: argparse.Namespace) -> list[table.Row]:
    """One row for each gate rate and way."""
    rows = []
    for rate in args.rate:
        with tempfile.TemporaryDirectory() as folder:
            files = {way: Path(folder) / f"{way}.pt" for way in WAYS}
            steps = {}
            for way, file in files.items():
                progress(f"gate rate {rate:g}: a step, {way}")
                steps[way] = in_fresh_process(measured, args, rate, way, file)
            progress(f"gate rate {rate:g}: comparing gradients")
            gap = gradient_gap(files["fused"], files["whole"])
        progress("")
        check_same(steps, gap, rate)
        rows += rows_of(steps, gap, rate)
    return rows


def gradient_gap(mine: Path, truth: Path) -> float:
    """Relative difference of all gradients together, |mine - truth| / |truth|."""
    mine, truth = (torch.load(path, mmap=True) for path in (mine, truth))
    if mine.keys() != truth.keys() or any((mine[n] is None) != (truth[n] is None) for n in truth):
        raise SystemExit("error: other parameters have gradients in one way than in the other")
    both = [(mine[name], g) for name, g in truth.items() if g is not None]
    off = math.hypot(*(float((a - b).norm()) for a, b in both))
    return off / math.hypot(*(float(b.norm()) for _, b in both))


def check_same(steps: dict[str, Step], gap: float, rate: float) -> None:
    """SystemExit where the two ways differ in loss, length of the gradient or gradient."""
    fused, whole = steps["fused"], steps["whole"]
    # The policy term is the mean of advantages, 0 up to rounding: its loss has no scale.
    same = math.isclose(fused.loss, whole.loss, rel_tol=TOLERANCE, abs_tol=1e-6)
    same &= math.isclose(fused.gradient_norm, whole.gradient_norm, rel_tol=TOLERANCE)
    if not same or not gap <= TOLERANCE:
        raise SystemExit(
            f"error: at gate rate {rate:g} fused has the loss {fused.loss:.7g}, a gradient of "
            f"length {fused.gradient_norm:.7g}, off by {gap:.1e}; whole the loss "
            f"{whole.loss:.7g} and length {whole.gradient_norm:.7g}; expected the same"
        )


def rows_of(steps: dict[str, Step], gap: float, rate: float) -> list[table.Row]:
    whole = steps["whole"]
    return [
        step.facts
        | {
            "gate_rate": rate,
            "way": way,
            "peak_mib": step.peak_mib,
            "held_mib": step.held_mib,
            "above_mib": step.above_mib,
            "seconds": step.seconds,
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "gradient_gap": gap if way != "whole" else 0.0,
            "x_peak": step.peak_mib / whole.peak_mib,
            "x_above": step.above_mib / whole.above_mib,
        }
        for way, step in steps.items()
    ]


def print_table(rows: list[table.Row]) -> None:
    print(f"\n{'':16} {'MiB':>8} {'':>8} {'':>8} {'x whole':>8} {'':>8}")
    head = ("peak", "held", "above", "peak", "above", "seconds", "loss", "gradient off")
    print(f"{'gate rate':>9} {'way':6} " + " ".join(f"{word:>8}" for word in head))
    for row in rows:
        sizes = (f"{row[name]:8.0f}" for name in ("peak_mib", "held_mib", "above_mib"))
        shares = (f"{row[name]:8.3f}" for name in ("x_peak", "x_above"))
        print(
            f"{row['gate_rate']:9g} {row['way']:6}",
            *sizes,
            *shares,
            f"{row['seconds']:8.1f} {row['loss']:8.5f} {row['gradient_gap']:12.1e}",
        )


def plot(rows: list[table.Row], picture: Path) -> None:
    """A bar for each gate rate and way: what is held before the step, on it what the step takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    colours = dict(zip(WAYS, ("#c0392b", "#7f8c8d"), strict=True))
    rates = list(dict.fromkeys(row["gate_rate"] for row in rows))
    for row in rows:
        place = rates.index(row["gate_rate"]) * (len(WAYS) + 1) + list(WAYS).index(row["way"])
        held, peak = row["held_mib"] / 1024, row["peak_mib"] / 1024
        axis.bar(place, held, 0.9, color="#dddddd")
        axis.bar(place, peak - held, 0.9, bottom=held, color=colours[row["way"]])
        axis.text(place, peak, f"{peak:.2f}", ha="center", va="bottom", size=8)
    centres = [place * (len(WAYS) + 1) + (len(WAYS) - 1) / 2 for place in range(len(rates))]
    axis.set_xticks(centres, [f"gate rate {rate:g}" for rate in rates])
    axis.set_ylabel("peak resident memory of a training step, GiB")
    axis.set_title(
        "{machine} ({capability}), {threads} threads, torch {torch}\n"
        "student {student}, teacher {teacher} (hidden, layers), V={V}, fp32, "
        "{completion_tokens} tokens in micro-batches of {micro_batch} completions".format(
            **rows[0]
        ),
        size=8,
        loc="left",
    )
    patches = [
        plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#dddddd", *colours.values())
    ]
    names = ["held before the step", "fused losses", "whole matrices"]
    figure.legend(patches, names, loc="outside lower center", ncols=len(names))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


# ---- the command ----


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    environment = {key: value for key, value in stamp().items() if key not in PEERS}
    import transformers

    environment["transformers"] = transformers.__version__
    environment |= {name: "{},{}".format(*getattr(args, name)) for name in ("student", "teacher")}
    rows = [environment | row for row in bench(args)]
    facts = COLUMNS[: COLUMNS.index("gate_rate")]
    print("\n".join(f"{name:18} {rows[0][name]}" for name in facts))
    print_table(rows)
    if args.csv:
        table.write(args.csv, rows, COLUMNS)
        print(f"\nwritten: {args.csv}")
    if args.plot:
        plot(rows, args.plot)
        print(f"written: {args.plot}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rate", type=float, nargs="+", default=[1.0, 0.5], help="gate rates (default 1 0.5)")
    add("--student", type=parse_size, default="256,8", help="HIDDEN,LAYERS (default 256,8)")
    add("--teacher", type=parse_size, default="384,8", help="HIDDEN,LAYERS (default 384,8)")
    add("--vocab", type=int, default=151936, help="rows of both heads (default 151936)")
    add("--prompts", type=int, default=2, help="questions of a step (default 2)")
    add("--generations", type=int, default=8, help="completions of each (default 8)")
    add("--tokens", type=int, default=192, help="per completion (default 192)")
    add("--micro-batch", type=int, default=8, help="completions at once (default 8)")
    add("--seed", type=int, default=0, help="of models, completions and gates (default 0)")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    add("--plot", type=Path, help="draw them here")
    args = parser.parse_args(arguments)
    check_problem(parser, args)
    return args


if __name__ == "__main__":
    main()
