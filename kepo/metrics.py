"""metrics.jsonl, one line per step or evaluation, and the picture drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kepo.checkpoint import append_durably


class MetricsLog:
    """Appends records; on resume, those of steps that will be run again are dropped first."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        fresh.replace(path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        append_durably(self.path, json.dumps({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_curves(metrics: Path, picture: Path, source: str | None = None) -> None:
    """Reward, accuracy, gate and rescue rates, divergence and entropy, seconds per phase, over
    steps.

    source: the training modality, drawn apart from the mean over the others.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(metrics)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    panels = [
        ("reward", ["reward/mean", "reward/accuracy", "reward/format"]),
        ("rates", ["gate/rate", "rescue/failed_rate", "rescue/rate", "completion/truncated"]),
        ("student against teacher", ["distill/divergence", "policy/entropy"]),
        ("loss", ["loss/policy", "loss/distill"]),
        ("seconds per step", ["time/rollout", "time/rescue", "time/teacher", "time/update"]),
    ]
    for axis, (title, keys) in zip(axes.flat, panels, strict=False):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axis.plot(*zip(*_smooth(points), strict=True), label=key)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    _plot_accuracy(axes.flat[-1], records, source)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _plot_accuracy(axis: Any, records: list[dict[str, Any]], source: str | None) -> None:
    tables = [(r["step"], r["eval"]) for r in records if "eval" in r]
    for name in sorted({name for _, table in tables for name in table}):
        style = dict(linewidth=2.5, color="black") if name == source else dict(alpha=0.6)
        points = [(step, table[name]) for step, table in tables if name in table]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axis.set(title="greedy accuracy on unseen images", xlabel="step", ylim=(0, 1))
    if tables:
        axis.legend(fontsize="x-small", ncols=2)
    axis.grid(alpha=0.3)


def _smooth(points: list[tuple[int, float]], window: int = 7) -> list[tuple[int, float]]:
    """Trailing mean, so that a trend shows through the noise of single steps."""
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window))
        for i, (step, _) in enumerate(points)
    ]
