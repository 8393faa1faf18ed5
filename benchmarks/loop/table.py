"""What step.py found: a line for each variant and length of prompt, a CSV, and a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.loop.variants import VARIANTS

Row = dict[str, object]
COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", "transformers", "trl", "commit"),
    *("date", "device", "dtype", "student", "teacher", "V", "prompt_tokens", "picture_tokens"),
    *("prompts", "generations", "length", "micro_batch", "variant", "tokens_per_second"),
    *("seconds", "seconds_p20", "seconds_p80", "rounds", "rollout_seconds", "teacher_seconds"),
    *("rest_seconds", "peak_mib", "held_mib", "above_mib", "loss", "gradient_gap"),
    *("x_seconds", "x_seconds_p20", "x_seconds_p80", "x_peak", "note"),
)
SHOWN = {
    **dict(
        prompt_tokens=("P", 5, "d"), variant=("variant", -10, ""), seconds=("seconds", 8, ".2f")
    ),
    **dict(tokens_per_second=("tokens/s", 9, ".1f"), rollout_seconds=("rollout", 8, ".2f")),
    **dict(teacher_seconds=("teacher", 8, ".2f"), rest_seconds=("rest", 8, ".2f")),
    **dict(peak_mib=("peak MiB", 9, ".0f"), above_mib=("above", 7, ".0f")),
    **dict(x_seconds=("x ours", 7, ".2f"), gradient_gap=("gap", 7, ".0e"), note=("note", 0, "")),
}
"""Columns of the printed table: head, width (negative: to the left), format."""


ENDS = ("_p20", "_p80")


class Table:
    """Rows, each printed and on disk as soon as it is known."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.rows = file, []
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        if self.file is not None:
            with self.file.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writerow({name: text(value) for name, value in row.items()})


def head() -> str:
    return line({name: words for name, (words, _, _) in SHOWN.items()})


def line(row: Row) -> str:
    def cell(name: str, width: int, form: str) -> str:
        value = row.get(name, "")
        words = value if isinstance(value, str) else format(value, form)
        return words.rjust(width) if width > 0 else words.ljust(-width)

    return " ".join(cell(name, *form) for name, (_, *form) in SHOWN.items()).rstrip()


def text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def draw(rows: list[Row], file: Path) -> None:
    """Draw seconds of a step against P/T, each variant a line with its tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in rows if row.get("seconds")]
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for name, variant in VARIANTS.items():
        mine = sorted(
            (row["prompt_tokens"] / row["length"], *(row[f"seconds{p}"] for p in ("", *ENDS)), row)
            for row in rows
            if row["variant"] == name
        )
        if not mine:
            continue
        places, middles, lows, tops, of = zip(*mine, strict=True)
        axis.plot(places, middles, "o-", color=variant.colour, label=variant.words)
        axis.fill_between(places, lows, tops, color=variant.colour, alpha=0.2, lw=0)
        for place, seconds, row in zip(places, middles, of, strict=True):
            axis.annotate(
                f"{row['tokens_per_second']:.0f}",
                (place, seconds),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                size=8,
                color=variant.colour,
            )
    ticks = sorted({row["prompt_tokens"] / row["length"] for row in rows})
    axis.set(xscale="log", yscale="log", ylabel="seconds of a step; completion tokens/s beside")
    axis.set_xlabel("tokens of a prompt / tokens of a completion")
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axis.margins(0.08, 0.15)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(
        "{machine} ({capability}), {threads} threads, torch {torch}, TRL {trl}\n"
        "student {student}, teacher {teacher}, V={V}, {dtype}; "
        "{prompts} prompts x {generations} completions of {length} tokens".format(**rows[0]),
        size=8,
        loc="left",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
