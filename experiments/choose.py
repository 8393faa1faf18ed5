"""Choose learning rates, coefficients and the best new method on the validation split.

    python -m experiments.choose

The choice is the grid point with the highest mean over the seeds of the OOD accuracy after the last
step; among equals the earlier in the plan. It goes into chosen.json, which every later run reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.analysis import Scores
from experiments.methods import NEW, Chosen, config_of
from experiments.plan import BLOCKS, TUNING_SEEDS
from kepo.disk.durable import as_json, naming, write_durably
from kepo.errors import KepoConfigError, KepoDataError, command
from kepo.flags import command_line
from kepo.words import at_home

CHOSEN = Path("experiments/chosen.json")


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    methods: Chosen = field(default_factory=dict)
    """Learning rate and coefficient by method."""
    best_new: str | None = None

    @property
    def new(self) -> str:
        """The best new method; raises KepoConfigError if none was chosen yet."""
        if self.best_new is None:
            raise KepoConfigError(
                "block asks for the best new method, which was not chosen yet; run the block `new` "
                "and `python -m experiments.choose`"
            )
        return self.best_new


@dataclass(frozen=True)
class Choose:
    """Settings of the choice."""

    results: str = "experiments/results"
    """Folder of the results, with those of the validation split."""
    chosen: str = str(CHOSEN)
    """File that is written."""


def read_choice(path: Path) -> Choice:
    """Return what was chosen, nothing without a file. Raises KepoDataError for a damaged one."""
    if not path.exists():
        return Choice()
    with naming(path):
        text = path.read_bytes()
    try:
        return Choice(**json.loads(text))
    except (ValueError, TypeError):
        raise KepoDataError(
            f"{path} is damaged; restore it, or remove it and run `python -m experiments.choose`"
        ) from None


def choose(scores: Scores) -> Choice:
    """Return the best grid point of every method whose grid is complete, and the best new method
    once all of them were run."""
    found = {spelling: _score(scores, spelling) for spelling in BLOCKS["tune"].methods}
    grids: dict[str, list[str]] = {}
    for spelling in found:
        grids.setdefault(spelling.partition("@")[0], []).append(spelling)
    methods: dict[str, Mapping[str, Any]] = {}
    for name, grid in grids.items():
        known = [(score, point) for point in grid if (score := found[point]) is not None]
        if len(known) == len(grid):
            best = max(known, key=lambda pair: pair[0])[1]
            methods[name] = _given(best)
    new = [(score, name) for name in NEW if (score := _score(scores, name)) is not None]
    best_new = max(new, key=lambda pair: pair[0])[1] if len(new) == len(NEW) else None
    return Choice(methods, best_new)


def _score(scores: Scores, method: str) -> float | None:
    """Return the mean OOD accuracy over the tuning seeds; None if one is missing."""
    if not {*TUNING_SEEDS} <= {*scores.seeds(method)}:
        return None
    return float(scores.accuracy(method, TUNING_SEEDS).mean())


def _given(spelling: str) -> dict[str, Any]:
    """Return the values of what a spelling changes."""
    names = [change.partition("=")[0] for change in spelling.partition("@")[2].split(",")]
    config = config_of(spelling, {})
    return {name: getattr(config, name) for name in names}


def _refuse_to_forget(before: Choice, now: Choice, settings: Choose) -> None:
    """Raise KepoConfigError if nothing can be chosen, or less than was chosen before."""
    gone = sorted(before.methods.keys() - now.methods.keys())
    if before.best_new is not None and now.best_new is None:
        gone.append(before.best_new)
    if gone or not (now.methods or now.best_new):
        raise KepoConfigError(
            f"results={settings.results} lacks runs of the validation split, by which "
            f"{', '.join(gone) or 'a method'} would be chosen; name the folder that has them, or "
            "run `python -m experiments.compare --block tune new`"
        )


def main() -> None:
    [settings] = command_line(Choose, prog="python -m experiments.choose", description=__doc__)
    settings = at_home(settings, "results", "chosen")
    choice = choose(Scores(Path(settings.results) / "cliff", "validation"))
    _refuse_to_forget(read_choice(Path(settings.chosen)), choice, settings)
    record = {"methods": choice.methods, "best_new": choice.best_new}
    write_durably(Path(settings.chosen), as_json(record, indent=1) + "\n")
    print(Path(settings.chosen).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    command(main)()
