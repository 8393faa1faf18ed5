"""Fill in the page: every number and table of experiments/README.md comes out of the results.

    python -m experiments.page

Between ``<!-- name arguments -->`` and ``<!-- / -->`` stands what a function of
experiments.report.tables makes of the results, or the word that it was not run. The rest is written
by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.choose import CHOSEN
from experiments.report import tables
from experiments.report.picture import draw
from experiments.report.tables import Book, NotRunError, points
from kepo.disk.durable import write_durably
from kepo.errors import KepoConfigError, command
from kepo.flags import command_line
from kepo.words import at_home

MARK = re.compile(
    r"(?P<open><!-- (?P<words>\w+(?: [\w@.,=-]+)*) -->)(?P<text>.*?)(?P<close><!-- / -->)",
    re.DOTALL,
)
PICTURE = "finding.png"
"""The picture's name; it lies beside the folder of the results."""


def picture(book: Book) -> str:
    """Return the picture, once there is one."""
    if not book.results.with_name(PICTURE).exists():
        raise NotRunError("not drawn yet")
    return f"![What KEPO, its parts and its rivals gain, and where]({PICTURE})"


PARTS: Mapping[str, Callable[..., str]] = {
    **{
        one.__name__: one
        for one in (
            *(tables.state, tables.settings, tables.methods, tables.chosen, tables.made_by),
            *(tables.verdicts, tables.accuracy, tables.differences, tables.cost),
            *(tables.factorial, tables.cells, tables.block, tables.dynamics, tables.renderings),
            *(tables.again, tables.same, tables.below, tables.tuned),
        )
    },
    "picture": picture,
    "seeds": tables.common_seeds,
    "level": lambda book, *words: points(tables.level(book, *words)),
    "gap": lambda book, *words: points(tables.gap(book, *words), signed=True),
    "word": lambda book, *words: tables.WORDS[tables.gap(book, *words).sign],
}
"""What may stand in a mark, by its first word."""


@dataclass(frozen=True)
class Page:
    """Settings of the page."""

    page: str = "experiments/README.md"
    """File whose marks are filled in."""
    results: str = "experiments/results"
    """Folder of the results."""
    chosen: str = str(CHOSEN)
    """File of what was chosen."""


def filled(text: str, book: Book) -> str:
    """Return the page with what its marks stand for; raises KepoConfigError for an unknown one."""

    def fill(match: re.Match[str]) -> str:
        name, *words = match["words"].split()
        if name not in PARTS:
            raise KepoConfigError(
                f"page has the mark {name!r}, which is none of {', '.join(PARTS)}"
            )
        try:
            found = PARTS[name](book, *words)
        except NotRunError as error:
            found = f"*{error}*"
        apart = "\n" if match["text"].startswith("\n") else ""
        return f"{match['open']}{apart}{found}{apart}{match['close']}"

    return MARK.sub(fill, text)


def main() -> None:
    [settings] = command_line(Page, prog="python -m experiments.page", description=__doc__)
    settings = at_home(settings, "page", "results", "chosen")
    if not Path(settings.results).is_dir():
        raise KepoConfigError(f"results={settings.results} is no folder; expected that of the runs")
    book, page = Book(Path(settings.results), Path(settings.chosen)), Path(settings.page)
    drawn = draw(book, book.results.with_name(PICTURE))
    write_durably(page, filled(page.read_text(encoding="utf-8"), book))
    print(f"{page} is filled in; {PICTURE}: {'drawn' if drawn else 'nothing to draw yet'}")


if __name__ == "__main__":
    command(main)()
