"""Weights & Biases, online or, with WANDB_MODE=offline, in ``run_dir/wandb``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kepo.run.sinks.cells import table_of


class WeightsAndBiases:
    """A sink that logs to a run whose id stays the same when training resumes.

    A step of W&B is ours, and W&B takes none before its last one. So online, steps that a resumed
    run does again keep what was logged first, and what a kill lost is told again from the logs.
    Offline, W&B cannot append: a resumed run begins another folder with all that was done before,
    and that folder alone is the one to sync.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], done: int, run_id: str):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kepo"),
            name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
            id=run_id,
            dir=str(run_dir),
            config=dict(settings),
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
        )
        self.done = done
        self.first = self.run.step
        """The first step that W&B still takes."""
        self.lacks_after = self.first - 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, dict(values))

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        table = table_of(records)
        images = {
            name: wandb.Image(x, caption=Path(name).name) for name, x in table.pictures.items()
        }
        columns = [f"picture {number + 1}" for number in range(table.most_shown)]
        rows = [
            [*row, *(images.get(name) for name in shown), *[None] * (len(columns) - len(shown))]
            for row, shown in zip(table.rows, table.shown, strict=True)
        ]
        found: dict[str, Any] = {"completions": wandb.Table([*table.columns, *columns], rows)}
        if images:
            # A table's pictures lie in W&B's own cache until it syncs; these are in the run's
            # folder.
            found["pictures"] = list(images.values())
        self._log(step, found)

    def close(self) -> None:
        self.run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # What ends up after the last step of a finished run, as an evaluation that a signal put
        # off, is new; it goes to the next step that W&B takes.
        at = max(step, self.first) if step == self.done else step
        if at >= self.first:
            self.run.log(values, step=at)
