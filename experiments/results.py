"""The results of a setting, as four tidy CSV files that are added to run by run.

runs.csv     a line per run: what made it, and what it cost
evals.csv    a line per run, evaluation and rendering, with the 0 and 1 of every question
curves.csv   a line per run and evaluation: means over the steps since the one before, sums so far
samples.csv  a line per run and rendering: of each question, how many of the last policy's samples
             are right
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kepo.disk.durable import make_folder, naming, write_durably
from kepo.errors import KepoDataError
from kepo.run.metrics import read_metrics

Row = dict[str, Any]


class Run(NamedTuple):
    """What tells the runs of a setting apart."""

    split: str
    seed: int
    method: str


SAMPLES = 4
"""Samples of each question from the policy of the last step."""
SAMPLES_FILE = "samples.json"
SUMS = {
    "seconds": "step_time",
    "sampled_completions": "kepo/sampled_completions",
    "data_completions": "kepo/data_completions",
    "student_tokens": "kepo/completion_tokens",
    "teacher_tokens": "kepo/teacher_tokens",
    "hint_tokens": "kepo/hint_tokens",
    "hint_groups": "kepo/hint_groups",
    "hint_attempts": "kepo/hint_attempts",
    "hint_accepted": "kepo/hint_accepted",
}
MEANS = {
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "equal_rewards": "frac_reward_zero_std",
    "gate_rate": "kepo/gate_rate",
    "hint_rate": "kepo/hint_rate",
    "rescue_rate": "kepo/rescue_rate",
    "hinted_rate": "kepo/hinted_rate",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "divergence": "kepo/divergence",
    "grad_norm": "grad_norm",
}
KEY = Run._fields
FILES = {
    "runs": (
        *KEY,
        *("fingerprint", "student", "teacher"),
        *SUMS,
        *("commit", "machine", "torch", "date"),
    ),
    "evals": (*KEY, "step", "modality", "accuracy", "items"),
    "curves": (*KEY, "step", *MEANS, *SUMS),
    "samples": (*KEY, "modality", "right"),
}


class Results:
    """The four files of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tables: dict[str, list[Row]] = {
            name: read_rows(folder / f"{name}.csv", columns) for name, columns in FILES.items()
        }
        # Lines of a run whose line in runs.csv is missing, as after a power loss.
        self.drop({run_of(row) for rows in self.tables.values() for row in rows} - self.runs.keys())
        self._check()

    def _check(self) -> None:
        """Raise KepoDataError if a run lacks lines in another file, or answers in a line."""
        lines: dict[str, dict[Run, dict[Any, str]]] = {name: {} for name in FILES}
        for name, rows in self.tables.items():
            for row in rows:
                part = row.get("step"), row.get("modality")
                answers = str(row.get("items") or row.get("right") or "")
                lines[name].setdefault(run_of(row), {})[part] = answers
        for run in self.runs:
            evals, curves, samples = (lines[n].get(run, {}) for n in ("evals", "curves", "samples"))
            asked = {modality: len(items) for (_, modality), items in evals.items()}
            steps = {step for step, _ in evals}
            whole = (
                asked
                and {"0"} < steps
                and {(step, m): len(x) for (step, m), x in evals.items()}
                == {(step, m): asked[m] for step in steps for m in asked}
                and curves.keys() == {(step, None) for step in steps - {"0"}}
                and {m: len(x) for (_, m), x in samples.items()} == asked
            )
            if not whole:
                folder = self.folder
                raise KepoDataError(
                    f"{folder} is damaged: its files have not the same evaluations of "
                    f"{run.method!r} with the seed {run.seed} on the {run.split} split; restore "
                    "them, or remove its line from runs.csv to have it made again"
                )

    @property
    def runs(self) -> dict[Run, Row]:
        return {run_of(row): row for row in self.tables["runs"]}

    def has(self, run: Run, fingerprint: str) -> bool:
        """Return whether the results hold this run, made with the same settings."""
        known = self.runs.get(run)
        return known is not None and known["fingerprint"] == fingerprint

    def first_answers(self, split: str) -> dict[int, dict[str, str]]:
        """Return by seed and rendering what the student answered rightly before the first step.

        Runs of one seed have one start, so any of them can say it."""
        found: dict[int, dict[str, str]] = {}
        for row in self.tables["evals"]:
            if row["split"] == split and row["step"] == "0":
                found.setdefault(int(row["seed"]), {})[row["modality"]] = row["items"]
        return found

    def drop(self, runs: Iterable[Run]) -> None:
        gone = set(runs)
        for name, rows in self.tables.items():
            self.tables[name] = [row for row in rows if run_of(row) not in gone]

    def add(self, run: Run, run_dir: Path, facts: Row) -> None:
        """Add a finished run, in place of an older one; ``facts`` are columns of runs.csv."""
        self.drop([run])
        key = {"split": run.split, "seed": str(run.seed), "method": run.method}
        records = read_metrics(run_dir / "metrics.jsonl")
        steps = [record for record in records if "step_time" in record]
        self.tables["runs"].append(_text(key | _sums(steps) | facts))
        before = 0
        for record in (r for r in records if "eval" in r):
            step = record["step"]
            for modality, items in record["eval_items"].items():
                row = {"step": step, "modality": modality, "items": items}
                row["accuracy"] = record["eval"][modality]
                self.tables["evals"].append(_text(key | row))
            if step:
                since = [one for one in steps if before < one["step"] <= step]
                so_far = [one for one in steps if one["step"] <= step]
                row = {"step": step, **_means(since), **_sums(so_far)}
                self.tables["curves"].append(_text(key | row))
            before = step
        right = json.loads((run_dir / SAMPLES_FILE).read_text(encoding="utf-8"))
        for modality, counts in right.items():
            self.tables["samples"].append(key | {"modality": modality, "right": counts})

    def write(self) -> None:
        """Write all files, each whole or not at all, ordered by split, seed and method.

        runs.csv comes last, so it holds no run whose other lines are missing.
        """
        make_folder(self.folder)
        for name, columns in reversed(FILES.items()):
            rows: list[Row] = sorted(self.tables[name], key=run_of)
            write_durably(self.folder / f"{name}.csv", as_csv(columns, rows))


def run_of(row: Row) -> Run:
    return Run(row["split"], int(row["seed"]), row["method"])


def as_csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _sums(steps: Sequence[Row]) -> Row:
    sums: Row = {name: sum(one.get(source) or 0 for one in steps) for name, source in SUMS.items()}
    return sums | {"seconds": round(sums["seconds"], 1)}


def _means(steps: Sequence[Row]) -> Row:
    """Return the mean of each column over the steps that have a number for it; None if none has."""
    found: Row = {}
    for name, source in MEANS.items():
        values = [x for one in steps if (x := one.get(source)) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a file with these columns, none if there is no file; raise KepoDataError
    if they are not what `as_csv` wrote."""
    if not path.exists():
        return []
    with naming(path):
        text = path.read_bytes()
    try:
        reader = csv.DictReader(io.StringIO(text.decode("utf-8"), newline=""), strict=True)
        rows = list(reader)
        whole = tuple(reader.fieldnames or ()) == tuple(columns) and all(
            _is_whole(row) for row in rows
        )
    except (ValueError, csv.Error):
        whole = False
    if not whole:
        raise KepoDataError(
            f"{path} is damaged; restore it, or remove it and the other results beside it to have "
            "them made again"
        )
    return rows


def _is_whole(row: Row) -> bool:
    """Return whether a row has every column, and only digits that can be as items.

    Raises ValueError if there is no number where one belongs.
    """
    if None in row or None in row.values():
        return False
    for name in row.keys() & {"seed", "step"}:
        int(row[name])
    for name in row.keys() & (MEANS.keys() | SUMS.keys()):
        float(row[name] or "nan")
    counts = set(map(str, range(SAMPLES + 1)))
    return set(row.get("items", "")) <= {"0", "1"} and set(row.get("right", "")) <= counts


def _text(row: Row) -> Row:
    return {
        name: "" if x is None else f"{x:.5g}" if isinstance(x, float) else str(x)
        for name, x in row.items()
    }
