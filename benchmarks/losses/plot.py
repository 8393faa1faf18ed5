"""A picture of a run: per case, time over the bare GEMMs on the left and peak memory on the right.

python benchmarks/losses/plot.py results.csv                      # of bench_loss.py --csv
python benchmarks/losses/plot.py results.csv --picture docs/bench.png --shape design joint peaked
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.losses import table
from benchmarks.losses.losses_of_ours import CASES

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "bench.png"
COLOURS = {
    "ours": "#c0392b",
    "eager": "#7f8c8d",
    "compiled": "#34495e",
    "liger": "#2980b9",
    "trl": "#e67e22",
    "cce": "#27ae60",
    "torch_lce": "#8e44ad",
}
NAMES = {
    "ours": "this package",
    "eager": "torch eager",
    "compiled": "torch.compile",
    "liger": "Liger",
    "trl": "TRL",
    "cce": "cut-cross-entropy",
    "torch_lce": "torch's linear_cross_entropy",
}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LONGEST = 4.0  # times the bare GEMMs: longer bars are cut there, and say so
PEAKED = 2.0  # nats: a mean entropy below belongs to rows as of a trained model

Row = dict[str, str]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        rows = [row for path in args.results for row in table.read(path)]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.shape:
        known = {row["shape"] for row in rows}
        unknown = [name for name in args.shape if name not in known]
        if unknown:
            sys.exit(f"error: no rows of shape {unknown[0]}; there are {', '.join(sorted(known))}")
        rows = [row for row in rows if row["shape"] in args.shape]
    # Two calls have no bare products of their own: the ratios compare them with one.
    rows = [row for row in rows if row["provider"] in COLOURS and row["case"] != "two_calls"]
    rows = [row for row in rows if _over(row) or _peak(row)]
    if not rows:
        sys.exit("error: no measurements in these files")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, args.picture)
    print(f"written: {args.picture}")


def plot(rows: list[Row], picture: Path) -> None:
    """Two panels of the same bars, grouped by shape and case, in the order of the rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["commit"], row["shape"], row["case"]), []).append(row)
    places, ticks, place = [], {}, 0.0
    for members in groups.values():
        ticks[place + (len(members) - 1) / 2] = group_label(members)
        places += [(place + i, row) for i, row in enumerate(members)]
        place += len(members) + 0.8
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1.7 + 0.26 * place), constrained_layout=True
    )
    left.set_yticks(list(ticks), ticks.values(), size=8)
    left.set_ylim(place - 1.2, -0.9)  # the first on top
    left.set_title("time over the bare matrix products", size=10)
    left.set_xlim(0, 1.3 * min(LONGEST, max(1.0, *(_over(row) or 0 for row in rows))))
    left.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=3)
    peaks = [_peak(row) for row in rows if _peak(row)] or [1.0]
    right.set_title("peak memory above the inputs, MiB, gradients included", size=10)
    right.set_xscale("log")
    right.set_xlim(min(peaks) / 2, max(peaks) * 2.5)
    for place, row in places:
        bar(left, place, row, _over(row), time_label(row))
        bar(right, place, row, _peak(row), f"{_peak(row):.0f}" if _peak(row) else "not measured")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
    used = [name for name in COLOURS if any(row["provider"] == name for row in rows)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in used]
    names, top = [NAMES[name] for name in used], {"loc": "outside upper center", "frameon": False}
    figure.legend(patches, names, ncols=min(6, len(used)), fontsize=9, **top)
    figure.supxlabel(caption(rows), size=8, color="dimgray")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def bar(axis, place: float, row: Row, value: float | None, label: str) -> None:
    """One bar with its label at the end; without a value the label alone, at the axis."""
    left = axis.get_xlim()[0]
    end = left if value is None else value
    if axis.get_xscale() == "linear":
        end = min(end, LONGEST)
    axis.barh(place, end - left, 0.86, left=left, color=COLOURS[row["provider"]])
    beside = {"textcoords": "offset points", "va": "center", "size": 7, "zorder": 4}
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the line at 1
    axis.annotate(label, (end, place), (4, 0), bbox=white, **beside)


def time_label(row: Row) -> str:
    """How many times the bare products and in which dtype, or the seconds where none were timed."""
    dtype = SHORT.get(row["dtype"], row["dtype"])
    over = _over(row)
    if over is None:
        return f"{float(row['seconds']):.3g} s   {dtype}"
    cut = " (cut)" if over > LONGEST else ""
    star = "*" if "scaled" in row["note"] else ""
    return f"{over:.2f}{star}{cut}   {dtype}"


def group_label(members: list[Row]) -> str:
    row = members[0]
    sizes = f"{int(row['N']):,} x {int(row['V']):,}, H {row['H']}"
    if row["case"] in ("kd_open", "kd_half", "joint", "kd_tol"):
        sizes += f" / {row['Ht']}"
    peaked = ", peaked rows" if float(row["entropy"]) < PEAKED else ""
    return f"{CASES.get(row['case'], row['case'])}{peaked}\n{sizes}"


def caption(rows: list[Row]) -> str:
    machines = {
        f"{row['machine']} ({row['capability']}), {row['threads']} threads, torch {row['torch']}"
        for row in rows
    }
    words = ["forward + backward, each in the dtype in which it is fastest here"]
    if any("scaled" in row["note"] for row in rows):
        words.append("* = scaled from fewer rows")
    words.append("sizes: tokens x vocabulary, H of student / teacher")
    return "\n".join((*sorted(machines), "; ".join(words)))


def _over(row: Row) -> float | None:
    return float(row["x_floor"]) if row["x_floor"] else None


def _peak(row: Row) -> float | None:
    return float(row["peak_mib"] or 0) or None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="CSV", help="written by bench_loss.py --csv")
    add("--picture", type=Path, default=PICTURE, help="image to write (default docs/bench.png)")
    add("--shape", nargs="+", help="only rows of these shapes (default: all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
