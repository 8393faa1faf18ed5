"""Bars from a results file of bench_loss.py: time over the GEMM floor, one group per case.

python benchmarks/plot.py benchmarks/results/<file>.json docs/bench.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TITLES = {
    "kd_open": "gated KD\nall open",
    "kd_half": "gated KD\nhalf open",
    "grpo": "GRPO",
    "joint": "KEPO\n(both at once)",
}
COLOURS = {"floor": "#bbbbbb", "ours": "#c0392b", "liger": "#2980b9", "eager": "#7f8c8d"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON written by bench_loss.py --json")
    parser.add_argument("picture", type=Path, help="image to write")
    args = parser.parse_args()
    plot(json.loads(args.results.read_text()), args.picture)
    print(f"written: {args.picture}")


def plot(rows: list[dict], picture: Path) -> None:
    """Seconds of the file's first shape; on each bar its ratio to the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    facts = ("N", "H", "Ht", "V", "dtype", "device")
    first = [row for row in rows if all(row[key] == rows[0][key] for key in facts)]
    figure, axis = plt.subplots(figsize=(9, 4), constrained_layout=True)
    width = 0.8 / len(COLOURS)
    for offset, (provider, colour) in enumerate(COLOURS.items()):
        mine = {row["case"]: row for row in first if row["provider"] == provider}
        places = [place + offset * width for place, case in enumerate(TITLES) if case in mine]
        bars = [mine[case] for case in TITLES if case in mine]
        label = "bare GEMMs" if provider == "floor" else provider
        axis.bar(places, [row["seconds"] for row in bars], width, color=colour, label=label)
        for place, row in zip(places, bars, strict=True):
            scaled = "*" if row["note"] else ""
            label = f"{row['x_floor']:.2f}{scaled}"
            axis.text(place, row["seconds"], label, ha="center", va="bottom", size=8)
    axis.set_yscale("log")
    axis.set_xticks([place + 1.5 * width for place in range(len(TITLES))], TITLES.values())
    axis.set_ylabel("seconds, forward + backward")
    row = first[0]
    axis.set_title(
        f"N={row['N']} H={row['H']} Ht={row['Ht']} V={row['V']} {row['dtype']}, {row['machine']} "
        f"({row['capability']}), torch {row['torch']}\n"
        "numbers: time over the bare GEMMs; * = scaled from fewer rows",
        size=9,
    )
    axis.legend(fontsize="small", ncols=4, loc="upper left")
    axis.margins(y=0.25)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
