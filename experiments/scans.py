"""The medical miniature over several seeds: accuracies on the test's pieces, and what KEPO gained.

Each seed is one run of `kepo demo --scans`, with its own data, teacher and student. The verdict is
the gain in the mean over the five unseen modalities, with Student's t interval over the seeds.
After an interruption, the same command continues.

    python -m experiments.scans --seeds 1 2 3
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kepo.errors import KepoConfigError, command
from kepo.evaluation.statistics import Interval, students_t
from kepo.flags import command_line
from kepo.scans.scan_questions import MODALITIES, SOURCE
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
    gain = students_t([unseen(one["after"]) - unseen(one["before"]) for one in found.values()])
    draw(found, gain, Path(settings.out).with_suffix(".png"))
    print("\n".join(lines(found, gain)))
    return gain


def lines(found: Found, gain: Interval) -> list[str]:
    """Return the table of means over the seeds, and the verdict."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    text = [f"{len(found)} seeds {'':26} {'before':>7} {'after':>7} {'teacher':>8}"]
    for name in MODALITIES:
        cells = [mean([of_modality(one[m], name) for one in found.values()]) for m in MOMENTS]
        text.append(f"{name:34} {cells[0]:7.3f} {cells[1]:7.3f} {cells[2]:8.3f}")
    verdict = "above 0" if gain.sign > 0 else "below 0" if gain.sign < 0 else "not told from 0"
    interval = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    text.append(f"gain over the five unseen modalities: {interval}, {verdict}")
    return text


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
