"""Write a report on one run or several: one HTML file that works without a network.

    kepo report runs/kepo                      # writes runs/kepo/report.html
    kepo report runs/a runs/b --out both.html  # one over the other

It has curves, accuracy before and after, memory, data left out, and the completions with their
pictures, to be filtered. A run that is still going, or was killed, has a report of what there is.
The pictures are small copies of your data: think of whom you give the file to.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kepo.disk.durable import write_durably
from kepo.disk.files import expanded
from kepo.errors import KepoConfigError
from kepo.flags import command_line, refuse
from kepo.report.collect import collect
from kepo.report.page import page
from kepo.words import at_home

USAGE = "RUN [RUN ...] [OPTIONS]"


@dataclass(frozen=True)
class ReportFlags:
    """Where the report is written, and how much of the completions it holds."""

    out: str | None = None
    """The file to write. None means report.html in the folder of the first run."""
    completions: int = 2000
    """The most completions in the file. Of more, those of whole steps are kept, spread over the
    run."""
    picture_mb: float = 8.0
    """The most MB of pictures in the file. 0 leaves them all out."""


def write_report(runs: Sequence[str | Path], flags: ReportFlags | None = None) -> Path:
    """Write the report on these run folders; return the file.

    Raises KepoConfigError for a folder that is not there or a setting out of range, OSError if the
    file cannot be written. What a run folder lacks is said in the report.
    """
    flags = at_home(flags or ReportFlags(), "out")
    if flags.completions < 0:
        raise KepoConfigError(f"completions={flags.completions}; expected a number >= 0")
    if not 0 <= flags.picture_mb <= 1000:
        raise KepoConfigError(f"picture_mb={flags.picture_mb}; expected a number in [0, 1000]")
    if not runs:
        raise KepoConfigError("runs is empty; expected at least one run folder")
    folders = [expanded(run) for run in runs]
    out = Path(flags.out) if flags.out is not None else folders[0] / "report.html"
    found = collect(folders)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise KepoConfigError(f"out={str(out)!r} cannot be written; expected a file in a folder")
    if not os.access(out.resolve().parent, os.W_OK):
        raise KepoConfigError(f"out={str(out)!r} cannot be written; choose another file with --out")
    text = page(
        found, completions=flags.completions, picture_bytes=int(flags.picture_mb * 1_000_000)
    )
    write_durably(out, text)
    return out


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo report``."""
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    [flags] = command_line(
        ReportFlags,
        prog="kepo report",
        usage=USAGE,
        args=arguments[len(runs) :],
        description=__doc__,
    )
    if not runs:
        refuse(f"RUN not given; expected kepo report {USAGE}")
    import jinja2  # noqa: F401 - a missing package is named before anything is read
    import plotly  # noqa: F401

    out = write_report(runs, flags)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
