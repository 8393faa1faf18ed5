"""Where the milliseconds of a call go on an H100 and on an H200: a model, beside what was measured.

    python tools/gpu_roofline.py                       # a table for each card, and its sources
    python tools/gpu_roofline.py --csv roofline.csv
    python tools/gpu_roofline.py --results FILE        # measured on an H100; default: the newest

For N = 8192, H = 2048, Ht = 5120, V = 151936 in bf16, the first shape of `make gpu`.

products, dW     Each kind as the probe of an H100 measured it, over and over, which is slower than
                 once: the card is at its power limit. An H200 has the same limit and, so the model
                 says, only writes faster: that share of the traffic which a product does not hide
                 is counted by its own bandwidth. The share is measured too, as what fp32 in place
                 of bf16 logits cost, and what `dW +=` in place of `dW =`.
softmax ... scaled   The longer of two: bytes at the share of a copy's bandwidth that the kernel
                 reached on the H100, and instructions a column (tools/sass.py).
small            Every launch (tests/kernels/compute/test_launches.py) at LAUNCH seconds.

The goals for an H200 were set before anything was measured, with every product at 790 TFLOP/s, the
best rate of a large square one; `met` is of what was measured since. `as set` is the total with
products and dW at that rate: whether what is ours, all but the products, came out as was hoped.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from benchmarks.gpu.targets import FIRST_SHAPE, H200

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
N, H, TEACHER_H, V = 8192, 2048, 5120, 151_936
PROBED = 2048  # rows of a chunk, and of the probe's products and row kernels
MULTIPROCESSORS, LANES = 132, 128  # of both cards, and of each multiprocessor
# Guessed, not measured:
CLOCK = 1.75e9  # Hz, under load
ISSUE = 0.75  # share of the issue slots that a row kernel can use
LAUNCH = 3e-6  # seconds of a small kernel and of the pause before it
GOALS_RATE = 790e12  # FLOP/s

# Rows with a teacher and without, forward passes, and whether there is a backward.
CASES = {
    "kd_open": (N, 0, 1, True),
    "kd_half": (N // 2, 0, 1, True),
    "joint": (N, 0, 1, True),
    "joint_half": (N // 2, N // 2, 1, True),
    "grpo": (0, N, 1, True),
    "logprobs_forward": (0, N, 1, False),
    "logprobs": (0, N, 2, True),
}
CARDS = ("H100", "H200")
PARTS = ("products", "dW", "softmax", "divergence", "backward", "scaled", "small")


class Sources(NamedTuple):
    """What the model knows from files."""

    files: dict[str, Path]  # by card
    measured: dict[str, list[dict[str, str]]]  # by card
    instructions: dict[tuple[str, str], float]  # a column, by kernel and kind of teacher
    launches: dict[str, dict[str, str]]  # by case

    @classmethod
    def read(cls, file: Path | None = None) -> Sources:
        if file is None:
            file = newest(holding("nvidia-h100*.csv", "probe_product"))
        files = {"H100": file, "H200": newest(holding("nvidia-h200*.csv", "logprobs_forward"))}
        instructions = {
            (row["kernel"], row["teacher"]): float(row["instructions"])
            for row in now(newest(RESULTS.glob("kernel_instructions_sm90_*.csv")))
            if row["capped"] == "False" and row["logits"] == "fp32"
        }
        launches = {row["case"]: row for row in now(newest(RESULTS.glob("launches_*.csv")))}
        measured = {card: read(path) for card, path in files.items()}
        return cls(files, measured, instructions, launches)

    def number(
        self, case: str, provider: str, column: str = "seconds", card: str = "H100"
    ) -> float:
        for row in self.measured[card]:
            same = (row["case"], row["provider"]) == (case, provider)
            if same and row["shape"] in ("", FIRST_SHAPE) and row[column]:
                return float(row[column])
        raise SystemExit(f"{self.files[card].name}: no {column} of {case}, {provider}")

    @property
    def bandwidth(self) -> float:
        """Of a copy on the H100, bytes a second."""
        return self.bandwidth_of("H100")

    def bandwidth_of(self, card: str) -> float:
        return 1e9 * self.number("copy", "torch", "gb_per_s", card)

    def product(self, name: str) -> float:
        return self.number("probe_product", f"{name}, {PROBED} rows")

    def exposed(self, slower: str, faster: str, more_bytes: float) -> float:
        """Share of a product's traffic that takes time of its own."""
        seconds = self.product(slower) - self.product(faster)
        return min(1.0, max(0.0, seconds * self.bandwidth / more_bytes))


def holding(pattern: str, words: str) -> list[Path]:
    """The results of that name that have the words."""
    return [path for path in RESULTS.glob(pattern) if words in path.read_text(encoding="utf-8")]


def newest(paths: Iterable[Path]) -> Path:
    """By their names, which end with the date."""
    return max(paths, key=lambda path: path.name)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def now(path: Path) -> list[dict[str, str]]:
    """Of a table of before and after."""
    return [row for row in read(path) if row["when"] == "after"]


def modelled(case: str, card: str, of: Sources) -> dict[str, float]:
    """Seconds by part, on a card with the products of an H100 and a bandwidth of its own."""
    teacher, plain, forwards, gradients = CASES[case]
    bandwidth = of.bandwidth_of(card)
    saved = 1 / of.bandwidth - 1 / bandwidth  # seconds a byte
    logits, head = 4.0 * PROBED * V, 4.0 * V * H
    of_logits = of.exposed("logits wide", "logits", logits / 2) * logits * saved
    of_dw = of.exposed("dW += wide", "dW = wide", head) * head * saved

    def rows(seconds: float, kernel: str, teacher: str) -> float:
        """Of a chunk, from the probe's."""
        slots = PROBED * V * of.instructions[kernel, teacher] / ISSUE
        issued = slots / (MULTIPROCESSORS * LANES * CLOCK)
        return max(seconds * of.bandwidth / bandwidth, issued)

    softmax = of.number("probe_row_forward", "none, float32")
    mixture = of.number("probe_row_forward", "JSD, float32") - 2 * softmax
    back = {kind: of.number("probe_row_backward", f"{kind}, float32") for kind in ("none", "JSD")}
    a, b = teacher / PROBED, plain / PROBED  # chunks with a teacher, and without
    parts = dict.fromkeys(PARTS, 0.0)
    parts["products"] = forwards * (a + b) * (of.product("logits wide") - of_logits)
    parts["products"] += a * (of.product("teacher wide") - of_logits)
    parts["softmax"] = forwards * (2 * a + b) * rows(softmax, "softmax_kernel", "none")
    parts["divergence"] = a * rows(mixture, "divergence_kernel", "mixture")
    parts["small"] = int(of.launches[case]["total"]) * LAUNCH
    if gradients:
        parts["products"] += (a + b) * of.product("dX wide")
        parts["dW"] = of.product("dW = wide") - of_dw
        parts["dW"] += (a + b - 1) * (of.product("dW += wide") - 2 * of_dw)
        parts["backward"] = a * rows(back["JSD"], "backward_kernel", "mixture")
        parts["backward"] += b * rows(back["none"], "backward_kernel", "none")
        cast = of.number("probe_scaled", "one launch" if case == "logprobs" else "ours")
        parts["scaled"] = cast * of.bandwidth / bandwidth
    return parts


def products_as_set(case: str) -> float:
    """Seconds of products and dW at the rate with which the goals were set."""
    teacher, plain, forwards, gradients = CASES[case]
    width = (teacher + plain) * H * (forwards + 2 * gradients) + teacher * TEACHER_H
    return 2.0 * V * width / GOALS_RATE


def table(of: Sources) -> list[dict[str, object]]:
    """One row for each card and case, in milliseconds. `bare`: the products and dW alone."""
    found = []
    for card in CARDS:
        for name in CASES:
            parts = modelled(name, card, of)
            total, floor = sum(parts.values()), parts["products"] + parts["dW"]
            row = {"card": card, "case": name, "chunks": of.launches[name]["chunks"]}
            row |= {part: 1e3 * seconds for part, seconds in parts.items()}
            row |= {"total": 1e3 * total, "bare": 1e3 * floor, "x_bare": total / floor}
            measured, bare = (of.number(name, who, card=card) for who in ("ours", "floor"))
            row |= {"measured": 1e3 * measured, "ratio": total / measured}
            row |= {"bare_measured": 1e3 * bare, "bare_ratio": floor / bare}
            if card == "H200" and name in H200:
                goal, as_set = H200[name], total - floor + products_as_set(name)
                row |= {"goal": 1e3 * goal, "met": "yes" if measured <= goal else "no"}
                row |= {"as set": 1e3 * as_set, "met as set": "yes" if as_set <= goal else "no"}
            found.append(row)
    return found


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--results", type=Path, help="rows measured on an H100")
    parser.add_argument("--csv", type=Path, help="write the table, in milliseconds, here")
    args = parser.parse_args(arguments)
    of = Sources.read(args.results)
    rows = table(of)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for card in CARDS:
        here = [row for row in rows if row["card"] == card]
        width = {name: max(6, len(name)) for name in columns[1:] if name in here[0]}
        width["case"] = max(map(len, CASES))
        print(f"\n{card}, ms\n" + " ".join(f"{name:>{n}}" for name, n in width.items()))
        for row in here:
            print(" ".join(f"{shown(row.get(name, '')):>{n}}" for name, n in width.items()))
    print(f"\nmeasured: {of.files['H100'].name}, products and row kernels by its probe;")
    print(f"          {of.files['H200'].name}, bandwidth and whole calls")
    print(f"guessed: {CLOCK / 1e9} GHz, {ISSUE} of the issue slots, {1e6 * LAUNCH} us a launch,")
    print("         and that an H200 multiplies as the H100")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: shown(x) for name, x in row.items()} for row in rows)
    return 0


def shown(x: object) -> str:
    return f"{x:.2f}" if isinstance(x, float) else str(x)


if __name__ == "__main__":
    sys.exit(main())
