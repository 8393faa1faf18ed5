"""The HTML page: everything in one file, which asks no network for anything.

What comes from a run is text, wherever it stands: jinja2 escapes it in markup, and the data for the
script is JSON in which nothing can end the element. The page's Content-Security-Policy allows the
scripts of this package by their digests and no other, and no address at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kepo.disk.durable import as_json
from kepo.report.collect import RunRecord
from kepo.report.completions import browsed
from kepo.report.figures import panels
from kepo.report.planned import memory
from kepo.report.tables import (
    compared,
    left_out,
    settings,
    shared_pictures,
    summary,
)
from kepo_kernels import __version__

HOME = Path(__file__).parent
COLOURS = 8
"""The number of colours that page.css has for runs and curves; more of them take them in turn."""


def page(runs: Sequence[RunRecord], *, completions: int, picture_bytes: int) -> str:
    """Return the page about these runs.

    completions: the most completions that it holds. picture_bytes: the same of pictures.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    script, plotly = (HOME / "page.js").read_text(encoding="utf-8"), _plotly()
    environment = Environment(
        loader=FileSystemLoader(HOME),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "change": change}
    found, accuracy = [_of(run) for run in runs], compared(runs)
    curves = panels(runs)
    browser = browsed(runs, completions, picture_bytes)
    changed, plain = settings(runs)
    return environment.get_template("page.html.j2").render(
        version=__version__,
        runs=found,
        curves=curves,
        accuracy=accuracy,
        browser=browser,
        changed=changed,
        plain=plain,
        colours=COLOURS,
        style=(HOME / "page.css").read_text(encoding="utf-8"),
        script=script,
        plotly=base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode("ascii"),
        digests=" ".join(f"'sha256-{_digest(text)}'" for text in (script, plotly)),
        data=for_script(
            {"runs": found, "curves": curves, "accuracy": accuracy, "browser": browser}
        ),
    )


def _of(run: RunRecord) -> dict[str, Any]:
    """Return what the page has of a run, plain values all."""
    return {
        "name": run.name,
        "missing": run.missing,
        "summary": summary(run),
        "student": _last(run.config.get("student")),
        "teacher": _last(run.config.get("teacher")),
        "trained_on": run.config.get("train_modalities"),
        "memory": memory(run),
        "data": left_out(run),
        "shared": shared_pictures(run),
    }


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def change(cell: Mapping[str, Any]) -> str:
    """Return the points of a hundred that an accuracy has gained."""
    before, after = cell["before"], cell["after"]
    return "–" if before is None else f"{100 * (after.share - before.share):+.1f}"


def _last(path: Any) -> str | None:
    """Return the last part of a model's path or Hub name; None if there is no model."""
    return Path(path).name if isinstance(path, str) and path else None


def for_script(value: Any) -> str:
    """Return JSON that may stand in a script element: no character of it ends the element, begins a
    comment, or is a line's end to JavaScript."""
    text = as_json(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _digest(text: str) -> str:
    """Return the digest by which a Content-Security-Policy allows an inline script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
