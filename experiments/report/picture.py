"""The picture of the page: what KEPO, its parts and its rivals gain, and where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import OOD
from experiments.methods import MAIN
from experiments.report.tables import OURS, Book, NotRunError, gap
from kepo.digits.demo import SOURCE
from kepo.disk.durable import replacing
from kepo.evaluation.statistics import Interval

COLOURS = {OURS: "#1b6ca8", "grpo": "#c0392b", "opd": "#444444"}
OTHERS = "#9aa5b1"
LABEL = 0.04
"""The height of a label, as a share of the picture's."""
PARTS = {
    "no_gate": "no gate",
    "gate_only": "no hints",
    "retry": "attempts, no hint",
    "wrong_gate": "gate for wrong",
    "kdpo_tau0": "no gate, no hints",
}
"""Ablations of KEPO at its learning rate, and what each is in a few words."""


def draw(book: Book, path: Path) -> bool:
    """Draw the picture; return False if the runs of the main methods are not there."""
    scores = book.scores()
    present = [name for name in MAIN if len(scores.seeds(name)) > 1]
    if OURS not in present:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    for axis, where, kind, title in (
        (axes[0], OOD, "unseen", "digits the warm-up never showed,\nrenderings never trained on"),
        (axes[1], (SOURCE,), "seen", "digits it knew, where it is trained:\nwhat is forgotten"),
    ):
        ends: dict[str, float] = {}
        for name in sorted(present, key=lambda name: name in COLOURS):
            seeds = scores.seeds(name)
            curve = 100 * scores.curve(name, seeds, where, kind=kind)
            colour = COLOURS.get(name, OTHERS)
            axis.plot(scores.steps(name), curve.mean(0), color=colour, label=name, zorder=2)
            if name in COLOURS:
                half = curve.std(0, ddof=1) / np.sqrt(len(seeds))
                low, high = curve.mean(0) - half, curve.mean(0) + half
                axis.fill_between(scores.steps(name), low, high, color=colour, alpha=0.15)
            ends[name] = float(curve.mean(0)[-1])
        axis.set(title=title, xlabel="step", ylabel="accuracy, %")
        axis.margins(x=0.18)
        low, high = axis.get_ylim()
        for name, height in apart(ends, LABEL * (high - low)).items():
            axis.annotate(
                name, (scores.steps(name)[-1], height), (4, 0), color=COLOURS.get(name, OTHERS),
                textcoords="offset points", fontsize="small", va="center",
            )  # fmt: skip
    _forest(axes[2], book)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return True


def apart(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """Return the heights of labels, in the same order, with at least ``least`` between neighbours:
    those that are too near are put about their common mean."""
    groups: list[list[str]] = []
    placed: dict[str, float] = {}
    for name in sorted(heights, key=lambda name: heights[name]):
        groups.append([name])
        while True:
            names = groups[-1]
            lowest = sum(heights[n] for n in names) / len(names) - least * (len(names) - 1) / 2
            if len(groups) == 1 or lowest - placed[groups[-2][-1]] >= least:
                break
            groups[-2:] = [groups[-2] + names]
        placed |= {n: lowest + least * place for place, n in enumerate(names)}
    return placed


def _forest(axis: Any, book: Book) -> None:
    """Draw OOD accuracy less that of `kepo`, with t intervals; rivals above, parts below, each from
    the highest to the lowest."""
    rows = []
    for names in ([name for name in MAIN if name != OURS], PARTS):
        there = [(name, one) for name in names if (one := _gap(book, name))]
        rows += sorted(there, key=lambda row: -row[1].mean)
    for place, (name, one) in enumerate(reversed(rows)):
        colour = COLOURS.get(name, OTHERS)
        axis.plot([100 * one.low, 100 * one.high], [place, place], color=colour, lw=2)
        axis.plot(100 * one.mean, place, "o", color=colour)
    axis.axvline(0, color=COLOURS[OURS], lw=1)
    labels = [f"{OURS}, {PARTS[x]}" if x in PARTS else x for x, _ in reversed(rows)]
    axis.set_yticks(range(len(rows)), labels)
    axis.set(
        title=f"OOD accuracy less {OURS}'s, 95 % t:\nright of the line is better than {OURS}",
        xlabel="points",
    )


def _gap(book: Book, name: str) -> Interval | None:
    try:
        return gap(book, name, OURS)
    except NotRunError:
        return None
