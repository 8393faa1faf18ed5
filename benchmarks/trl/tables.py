"""Compare TRL's losses with ours, classify TRL's options, count products; write the tables.

    python -m benchmarks.trl.tables          # two minutes on a CPU; benchmarks/results/trl_*.csv

and the tables of docs/trainers.md, between its two marks.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.trl import distillation_equality, grpo_equality
from benchmarks.trl.distillation_equality import Shape, by_trl, by_us, work
from benchmarks.trl.options import EQUAL, HEAD, JOINT, OTHERS, UNCONCERNED, Row, rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "trainers.md"
START, END = "<!-- tables of benchmarks/trl/tables.py -->\n", "<!-- end of tables -->\n"


class Equal(NamedTuple):
    trainer: str
    formula: str
    adapter: str
    way: str
    loss: str
    gradient: str
    metrics: str


class Products(NamedTuple):
    divergence: str
    student: int
    teacher: int
    trl_flops: int
    our_flops: int
    flops_ratio: str
    trl_ms: str
    our_ms: str
    ms_ratio: str


def equalities(folder: Path) -> Iterable[Equal]:
    """Compare every case; differences are relative, in fp32."""
    for trainer, module in (("GRPO", grpo_equality), ("Distillation", distillation_equality)):
        comparing: Any = module
        for case in comparing.CASES:
            for adapter, (way, found) in comparing.differences(case, folder).items():
                numbers = (f"{x:.0e}" for x in (found.loss, found.gradient, found.metrics))
                yield Equal(trainer, case.name, adapter, way, *numbers)


def products() -> Iterable[Products]:
    """Count the products of both, at the widths of a 2B student beside a 14B teacher and at equal
    ones, an eighth of them each; times are those of fp32 on one thread."""
    torch.set_num_threads(1)
    shape = Shape(rows=512, vocabulary=16384, student=256, teacher=640)
    for each in (shape, Shape(shape.rows, shape.vocabulary, shape.student, shape.student)):
        for beta, name in (
            (0.0, "KL(teacher|student)"),
            (1.0, "KL(student|teacher)"),
            (0.5, "JSD"),
        ):
            theirs, ours = (work(by, beta, each) for by in (by_trl, by_us))
            yield Products(
                name,
                each.student,
                each.teacher,
                theirs.flops,
                ours.flops,
                f"{ours.flops / theirs.flops:.3f}",
                f"{1e3 * theirs.seconds:.0f}",
                f"{1e3 * ours.seconds:.0f}",
                f"{ours.seconds / theirs.seconds:.2f}",
            )


def write(name: str, made: Sequence[Any]) -> None:
    with (RESULTS / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(made[0]._fields)
        writer.writerows(made)


def read(name: str, kind: Any) -> list[Any]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return [kind(*row) for row in list(csv.reader(file))[1:]]


# ---- the page ----


def page_tables() -> str:
    """Make the tables of the page from the files of results."""
    return "\n".join(
        [
            *equality_table(read("trl_equality.csv", Equal)),
            "",
            *option_table(read("trl_options.csv", Row)),
            "",
            *product_table(read("trl_products.csv", Products)),
            "",
        ]
    )


def equality_table(found: list[Equal]) -> list[str]:
    lines = [
        "| TRL's | adapter | by | loss | gradient |",
        "|---|---|---|---|---|",
    ]
    for x in found:
        if x.adapter != HEAD:
            name = x.formula.replace("|", "\\|")
            lines.append(f"| {name} | `{x.adapter}` | {x.way} | {x.loss} | {x.gradient} |")
    heads = [x for x in found if x.adapter == HEAD and not x.formula.startswith("bf16")]
    most = (max((getattr(x, name) for x in heads), key=float) for name in ("loss", "gradient"))
    lines += [
        f"| all of GRPO's above but bf16, at most | `fuse_head` | head | {' | '.join(most)} |"
    ]
    return lines


def option_table(found: list[Row]) -> list[str]:
    """Say what becomes of the options, by adapter and verdict."""
    lines = ["| adapter | verdict | options |", "|---|---|---|"]
    by_verdict = sorted(found, key=lambda row: (row.adapter != JOINT, row.adapter, row.verdict))
    for (adapter, verdict), group in groupby(by_verdict, lambda row: (row.adapter, row.verdict)):
        chosen = list(group)
        if verdict == UNCONCERNED:
            words = reasons(chosen)
        elif (adapter, verdict) == (HEAD, EQUAL):
            words = f"those that are equal or a fallback in `{JOINT}`"
        else:
            noted = {row.option: row.why for row in chosen if verdict != EQUAL}
            names = [f"`{row.option}`" for row in chosen]
            notes = [f" ({noted[row.option]})" if row.option in noted else "" for row in chosen]
            words = ", ".join(map("".join, zip(names, notes, strict=True)))
        lines.append(f"| `{adapter}` | {verdict} ({len(chosen)}) | {words} |")
    return lines


def reasons(chosen: list[Row]) -> str:
    """Count the options that no loss reads, by what they are about."""
    counts = Counter(row.why for row in chosen)
    others = counts.pop(OTHERS)
    return "; ".join(f"{n}: {why}" for why, n in counts.most_common()) + f"; {others}: {OTHERS}"


def product_table(found: list[Products]) -> list[str]:
    lines = [
        "| divergence | student, teacher wide | products, of TRL's | time on a CPU, of TRL's |",
        "|---|---|---|---|",
    ]
    for x in found:
        times = f"{x.ms_ratio} ({x.our_ms} against {x.trl_ms} ms)"
        name = x.divergence.replace("|", "\\|")
        lines.append(f"| {name} | {x.student}, {x.teacher} | {x.flops_ratio} | {times} |")
    return lines


def put_into_the_page(tables: str) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    PAGE.write_text(before + START + tables + END + after, encoding="utf-8")


def main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    write("trl_options.csv", list(rows()))
    with tempfile.TemporaryDirectory() as folder:
        found = list(equalities(Path(folder)))
    write("trl_equality.csv", found)
    write("trl_products.csv", list(products()))
    put_into_the_page(page_tables())
    print(PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0])
    print(dict(Counter(row.verdict for row in rows())))


if __name__ == "__main__":
    main()
