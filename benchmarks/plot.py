"""A picture of results: time over the bare GEMMs, and peak memory, per case and provider.

python benchmarks/plot.py                                  # benchmarks/results/bench_*.csv
python benchmarks/plot.py one.csv other.csv --picture docs/bench.png --shape design joint
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import table

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE = RESULTS.parent.parent / "docs" / "bench.png"
COLOURS = {
    "floor": "#bbbbbb",
    "ours": "#c0392b",
    "eager": "#7f8c8d",
    "compiled": "#34495e",
    "liger": "#2980b9",
    "trl": "#e67e22",
    "cce": "#27ae60",
    "torch_lce": "#8e44ad",
}
NAMES = {"floor": "bare GEMMs", "eager": "torch eager", "compiled": "torch.compile"}

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
    rows = [row for row in rows if not row["case"].startswith("ratio:")]
    if not rows:
        sys.exit("error: no measurements in these files")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, args.picture)
    print(f"written: {args.picture}")


def plot(rows: list[Row], picture: Path) -> None:
    """Two panels, one bar for each provider of each case; what was scaled wears a star."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = [row for row in rows if row["x_floor"] and row["provider"] != "floor"]
    memory = [row for row in rows if row["peak_mib"] and float(row["peak_mib"]) > 0]
    figure, axes = plt.subplots(
        2, 1, figsize=(max(9, 0.35 * max(len(times), len(memory))), 8), constrained_layout=True
    )
    bars(axes[0], times, "x_floor", "{:.2f}")
    axes[0].axhline(1, color=COLOURS["floor"], linestyle="--", zorder=0)
    axes[0].set_ylabel("time / bare GEMMs")
    bars(axes[1], memory, "peak_mib", "{:.0f}")
    axes[1].set_ylabel("peak memory above the inputs, MiB")
    axes[0].set_title(caption(rows), size=8, loc="left")
    used = [name for name in COLOURS if any(row["provider"] == name for row in times + memory)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in used]
    figure.legend(
        patches, [NAMES.get(name, name) for name in used], loc="outside lower center", ncols=8
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def bars(axis, rows: list[Row], column: str, label: str) -> None:
    """Groups by shape and case, in the order of the rows; logarithmic."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["case"], row["dtype"]), []).append(row)
    place, ticks = 0.0, {}
    for (shape, case, dtype), members in groups.items():
        ticks[place + (len(members) - 1) / 2] = f"{case}\n{shape}\n{dtype}"
        for row in members:
            value, colour = float(row[column]), COLOURS.get(row["provider"], "black")
            axis.bar(place, value, 0.9, color=colour)
            star = "*" if "scaled" in row["note"] else ""
            axis.text(place, value, label.format(value) + star, ha="center", va="bottom", size=7)
            place += 1
        place += 1
    if rows:
        axis.set_yscale("log")
        axis.set_xticks(list(ticks), ticks.values(), size=7)
        axis.margins(x=0.02, y=0.12)
    else:
        axis.text(0.5, 0.5, "nothing measured", transform=axis.transAxes, ha="center")
        axis.set_xticks([])


def caption(rows: list[Row]) -> str:
    sizes = {
        row["shape"]: f"{row['shape']}: N={row['N']} H={row['H']} Ht={row['Ht']} V={row['V']}"
        for row in rows
    }
    machines = {
        f"{row['machine']} ({row['capability']}), {row['threads']} threads, torch {row['torch']}"
        for row in rows
    }
    return "\n".join(
        (
            *sorted(machines),
            *sizes.values(),
            "forward + backward; * = time scaled from fewer rows",
        )
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "results",
        type=Path,
        nargs="*",
        metavar="CSV",
        help="files written by bench_loss.py --csv (default: benchmarks/results/bench_*.csv)",
    )
    add("--picture", type=Path, default=PICTURE, help="image to write (default docs/bench.png)")
    add("--shape", nargs="+", help="only rows of these shapes (default: all)")
    args = parser.parse_args(arguments)
    args.results = args.results or sorted(RESULTS.glob("bench_*.csv"))
    if not args.results:
        parser.error(f"no bench_*.csv in {RESULTS}; name the files")
    return args


if __name__ == "__main__":
    main()
