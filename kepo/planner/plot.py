"""The picture of a plan: a bar for each phase, stacked by the items it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kepo.disk.durable import replacing
from kepo.planner.memory import Phase
from kepo.planner.standing import GIB, ITEMS, Machine


def plot_plan(phases: Sequence[Phase], machine: Machine, picture: Path) -> None:
    """Draw the phases into the file ``picture``; the dashed line is what a GPU offers a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.6 * len(phases)), constrained_layout=True)
    names = [f"{phase.name}\n{phase.moment}" for phase in phases]
    starts = [0.0] * len(phases)
    for item, color in zip(ITEMS, plt.get_cmap("tab10").colors, strict=True):
        sizes = [phase.held[item] / GIB for phase in phases]
        if any(sizes):
            axis.barh(names, sizes, left=starts, label=item, color=color)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axis.axvline(machine.offered / GIB, color="black", linestyle="--")
    axis.invert_yaxis()
    axis.set(xlabel="GB per GPU", xlim=(0, 1.05 * max(*starts, machine.gpu_bytes / GIB)))
    axis.legend(fontsize="x-small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    with replacing(picture) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)
