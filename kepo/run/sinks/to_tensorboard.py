"""TensorBoard: event files in ``run_dir/tensorboard``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kepo.run.sinks.cells import table_of


class TensorBoard:
    """A sink that appends to event files. TensorBoard's pages leave out what they have of steps
    that a resumed run does again: its purge_step. Each step is in the file before the next
    begins."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], done: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        has = done if any(folder.glob("events.*")) else -1
        self.lacks_after = has
        self.writer = SummaryWriter(str(folder), purge_step=has + 1)
        text = json.dumps(settings, indent=1)
        self.writer.add_text("config", f"```\n{text}\n```", has + 1)
        self.writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write a table as text, and the pictures beside it: text cannot hold them. Its last column
        has the pictures' numbers."""
        table = table_of(records)
        number = {name: place for place, name in enumerate(table.pictures, 1)}
        lines = [[*table.columns, "pictures"], ["---"] * (len(table.columns) + 1)]
        for row, shown in zip(table.rows, table.shown, strict=True):
            numbers = ", ".join(str(number.get(name, "missing")) for name in shown)
            lines.append([*map(as_plain, row), numbers])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.writer.add_text("completions", text, step)
        for name, picture in table.pictures.items():
            tag = f"completions/picture_{number[name]}"
            self.writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def as_plain(value: Any) -> str:
    """Return a value as a cell of Markdown that shows its text as it is: no character of it is
    taken for markup, and tags of an answer stay to be seen."""
    text = "" if value is None else str(value)
    escaped = re.sub(r"[&<>|*_`~\\\[\]#!$]", lambda found: f"&#{ord(found[0])};", text)
    return re.sub(r"\r\n?|\n", "<br>", escaped)
