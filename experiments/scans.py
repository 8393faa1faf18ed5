"""The medical miniature over several seeds: accuracies on the test's pieces, and what KEPO gained.

Each seed is one run of `kepo demo --scans`, with its own data, teacher and student. The verdict is
the gain in the mean over the five unseen modalities, with Student's t interval over the seeds.
After an interruption, the same command continues.

    python -m experiments.scans --seeds 1 2 3
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

from kepo.errors import KepoConfigError, command
from kepo.evaluation.statistics import Interval, students_t
from kepo.flags import command_line
from kepo.scans.scan_questions import KINDS, MODALITIES, SOURCE
from kepo.scans.study import Scans, of_modality, run, unseen
from kepo.words import at_home

MOMENTS = ("before", "after", "teacher")
Found = dict[int, dict[str, dict[str, float]]]
"""By seed what accuracy.json holds: accuracies by moment and "modality: type"."""


@dataclass(frozen=True)
class Seeds:
    """Which seeds are run, and where the results go."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """The seeds, each a run of its own."""
    root: str = "runs/scans-seeds"
    """Folder of the runs."""
    out: str = "experiments/scans.csv"
    """The file of the results: a row for each seed, modality and type of question. Beside it a
    picture of the same name is written."""


def run_seeds(settings: Seeds, study: Scans | None = None) -> Interval:
    """Run all seeds, write the results, print the verdict, and return it. study: the other settings
    of every run."""
    settings = at_home(settings, "root", "out")
    if len({*settings.seeds}) < 2 or len({*settings.seeds}) < len(settings.seeds):
        raise KepoConfigError(f"seeds={settings.seeds}; expected two or more different ones")
    found: Found = {}
    for seed in settings.seeds:
        root = Path(settings.root) / f"seed-{seed}"
        asked = replace(study or Scans(), root=str(root), seed=seed)
        if code := run(asked):
            sys.exit(code)
        found[seed] = json.loads((root / "accuracy.json").read_text(encoding="utf-8"))
    _write(Path(settings.out), found)
    gain = gained(found)
    draw(found, gain, Path(settings.out).with_suffix(".png"))
    print("\n".join(lines(found, gain)))
    return gain


def gained(found: Found) -> Interval:
    """Return the gain in the mean over the five unseen modalities, by t over the seeds."""
    return students_t([unseen(one["after"]) - unseen(one["before"]) for one in found.values()])


def means(found: Found) -> dict[str, list[float]]:
    """Return for each modality, for each of its types of questions, and for the unseen ones, the
    means over the seeds before and after KEPO and of the teacher."""

    def mean(part: Callable[[dict[str, float]], float]) -> list[float]:
        return [statistics.fmean(part(one[m]) for one in found.values()) for m in MOMENTS]

    cells = list(next(iter(found.values()))["after"])
    rows: dict[str, list[float]] = {}
    for name in MODALITIES:
        rows[name] = mean(partial(of_modality, modality=name))
        rows |= {cell: mean(itemgetter(cell)) for cell in cells if cell.startswith(f"{name}: ")}
    return rows | {"mean of the five unseen": mean(unseen)}


def verdict(gain: Interval) -> str:
    sign = "above 0" if gain.sign > 0 else "below 0" if gain.sign < 0 else "not told from 0"
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}], {sign}"


def lines(found: Found, gain: Interval) -> list[str]:
    """Return the table of means over the seeds, and the verdict."""
    text = [f"{len(found)} seeds {'':26} {'before':>7} {'after':>7} {'teacher':>8}"]
    for name, (before, after, teacher) in means(found).items():
        indented = name if ": " not in name else f"    {name.partition(': ')[2]}"
        text.append(f"{indented:34} {before:7.3f} {after:7.3f} {teacher:8.3f}")
    text.append(f"gain over the five unseen modalities: {verdict(gain)}")
    return text


def page(found: Found) -> str:
    """Return what docs/training.md says of the test: a table, and the verdict."""
    types = {kind: kind.lower() for kind in KINDS}
    text = [
        f"| {len(found)} seeds, before → after (teacher) | all | {' | '.join(types.values())} |",
        f"|---|---|{'---|' * len(types)}",
    ]
    rows = means(found)
    for name in [*MODALITIES, "mean of the five unseen"]:
        cells = [rows.get(cell) for cell in (name, *(f"{name}: {kind}" for kind in types))]
        shown = ["" if x is None else f"{x[0]:.2f} → {x[1]:.2f} ({x[2]:.2f})" for x in cells]
        label = f"{name}, trained on" if name == SOURCE else name
        text.append(f"| {label} | {' | '.join(shown)} |")
    text += [
        "",
        f"Gain over the five unseen modalities, by t over the seeds: {verdict(gained(found))}.",
    ]
    return "\n".join(text)


def read(out: Path) -> Found:
    """Return what `run_seeds` has written."""
    found: Found = {}
    with out.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            one = found.setdefault(int(row["seed"]), {moment: {} for moment in MOMENTS})
            for moment in MOMENTS:
                cell = f"{row['modality']}: {row['question_type']}"
                one[moment][cell] = float(row[moment])
    return found


def draw(found: Found, gain: Interval, out: Path) -> None:
    """Write a picture: for each modality the mean before and after KEPO, a dot for each seed, and
    the teacher's mean as a line."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for place, name in enumerate(MODALITIES):
        for moment, shift, colour in (("before", -0.2, "#b0b0b0"), ("after", 0.2, "#3b75af")):
            values = [of_modality(one[moment], name) for one in found.values()]
            axes.bar(place + shift, sum(values) / len(values), 0.36, color=colour, label=moment)
            axes.plot([place + shift] * len(values), values, "k.", markersize=3)
        best = [of_modality(one["teacher"], name) for one in found.values()]
        axes.hlines(sum(best) / len(best), place - 0.4, place + 0.4, colors="k", label="teacher")
    axes.set_xticks(range(len(MODALITIES)), [name.replace(" ", "\n") for name in MODALITIES])
    axes.set(ylabel="greedy accuracy", ylim=(0, 1))
    interval = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    axes.set_title(f"trained on {SOURCE} alone; gain over the five unseen {interval}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axes.legend(by_label.values(), by_label.keys(), ncols=3, frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _write(out: Path, found: Found) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["seed", "modality", "question_type", *MOMENTS])
        for seed, one in found.items():
            for cell in one["after"]:
                values = [f"{one[moment][cell]:.4f}" for moment in MOMENTS]
                rows.writerow([seed, *cell.split(": "), *values])


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m experiments.scans``."""
    [settings] = command_line(
        Seeds, prog="python -m experiments.scans", args=arguments, description=__doc__
    )
    run_seeds(settings)


if __name__ == "__main__":
    main()
