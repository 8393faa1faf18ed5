"""The picture of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kepo.disk.durable import replacing
from kepo.run.metrics import read_metrics

FORMER = {"kepo/distill_loss": "kepo/kd_loss"}
"""The names that keys have in logs of earlier versions."""


def plot_curves(metrics: Path, picture: Path, source: str | None = None) -> None:
    """Plot reward, gate and hint rates, divergence, entropy, losses, seconds per phase, accuracy.

    Numbers that were not finite, null in the log, are gaps.

    source: the training modality, drawn apart from the mean over the others.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(metrics)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    rewards = sorted({k for r in records for k in r if k.startswith("rewards/") and "mean" in k})
    panels = [
        ("reward", ["reward", *rewards]),
        ("rates", ["kepo/gate_rate", "kepo/hint_rate", "kepo/rescue_rate", "frac_reward_zero_std"]),
        ("student against teacher", ["kepo/divergence", "entropy"]),
        ("loss", ["kepo/policy_loss", "kepo/distill_loss"]),
        ("seconds per step", ["time/rollout", "time/hint", "time/teacher", "time/update"]),
    ]
    for axis, (title, keys) in zip(axes.flat, panels, strict=False):
        for key in keys:
            if points := points_of(records, key):
                axis.plot(*zip(*_smooth(points), strict=True), label=key)
        axis.set(title=title, xlabel="step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    _plot_accuracy(axes.flat[-1], records, source)
    with replacing(picture) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def points_of(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the records that have a value of the key, or of its former name."""
    former = FORMER.get(key, key)
    values = [(r["step"], r.get(key, r.get(former))) for r in records]
    return [(step, value) for step, value in values if value is not None]


def _plot_accuracy(axis: Any, records: list[dict[str, Any]], source: str | None) -> None:
    tables = [(r["step"], r["eval"]) for r in records if "eval" in r]
    for name in sorted({name for _, table in tables for name in table}):
        style = dict(linewidth=2.5, color="black") if name == source else dict(alpha=0.6)
        points = [(step, table[name]) for step, table in tables if table.get(name) is not None]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axis.set(title="greedy accuracy on unseen images", xlabel="step", ylim=(0, 1))
    if tables:
        axis.legend(fontsize="x-small", ncols=2)
    axis.grid(alpha=0.3)


def _smooth(points: list[tuple[int, float]], window: int = 7) -> list[tuple[int, float]]:
    """Return the trailing mean, so that a trend shows through the noise of single steps."""
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window))
        for i, (step, _) in enumerate(points)
    ]
