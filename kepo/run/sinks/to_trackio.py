"""Trackio: its store on this machine, or the Space or server that TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kepo.run.sinks.cells import table_of


class Trackio:
    """A sink that logs to a run of the project ``kepo``, or TRACKIO_PROJECT, named by the run's
    folder and id.

    Trackio writes a little later than it is told, and can take nothing back. So a resumed run is
    told anew, from the logs: on this machine in place of what the store had, elsewhere as another
    run.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], done: int, run_id: str):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "kepo")
        name = f"{run_dir.resolve().name}-{run_id}"
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            name += f"-from-{done}" if done >= 0 else ""
        else:
            _forget(project, name)
        self.run = trackio.init(project, name=name, config=dict(settings), embed=False)
        self.lacks_after = -1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        import trackio

        table = table_of(records)
        images = {
            name: trackio.Image(x, caption=Path(name).name) for name, x in table.pictures.items()
        }
        rows = [
            [*row, [images[name] for name in shown if name in images]]
            for row, shown in zip(table.rows, table.shown, strict=True)
        ]
        found = trackio.Table(columns=[*table.columns, "pictures"], data=rows)
        self.run.log({"completions": found}, step=step)

    def close(self) -> None:
        self.run.finish()


def _forget(project: str, name: str) -> None:
    """Delete what the store of this machine has of a run."""
    import trackio

    try:
        known = list(trackio.Api().runs(project))
    except ValueError:  # it does not have the project yet
        return
    for run in known:
        if run.name == name:
            run.delete()
