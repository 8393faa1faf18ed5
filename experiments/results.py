"""The results of a comparison, as three tidy CSV files that are added to run by run.

runs.csv    a line per run: what made it, and what it cost
evals.csv   a line per run, evaluation and modality, with the 0 and 1 of every question
steps.csv   a line per run and step: the curves
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kepo.disk.durable import make_folder, naming, write_durably
from kepo.errors import KepoDataError
from kepo.run.metrics import read_metrics

Row = dict[str, Any]
Run = tuple[int, str]  # seed, method

COSTS = {  # summed over the steps
    "seconds": "step_time",
    "sampled_completions": "kepo/sampled_completions",
    "student_tokens": "kepo/completion_tokens",
    "teacher_tokens": "kepo/teacher_tokens",
    "hint_groups": "kepo/hint_groups",
    "hint_attempts": "kepo/hint_attempts",
    "hint_accepted": "kepo/hint_accepted",
}
CURVES = {
    "reward": "reward",
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "gate_rate": "kepo/gate_rate",
    "hint_rate": "kepo/hint_rate",
    "rescue_rate": "kepo/rescue_rate",
    "entropy": "entropy",
    "divergence": "kepo/divergence",
    "grad_norm": "grad_norm",
}
FILES = {
    "runs": (
        "seed",
        "method",
        "fingerprint",
        "warmup",
        "teacher",
        *COSTS,
        "commit",
        "machine",
        "torch",
        "date",
    ),
    "evals": ("seed", "method", "step", "modality", "accuracy", "items"),
    "steps": ("seed", "method", "step", *CURVES),
}


class Results:
    """The three files of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tables: dict[str, list[Row]] = {name: _read(folder / f"{name}.csv") for name in FILES}
        # Lines of a run whose line in runs.csv is missing, as after a power loss.
        self.drop({_run(row) for rows in self.tables.values() for row in rows} - self.runs.keys())

    @property
    def runs(self) -> dict[Run, Row]:
        return {_run(row): row for row in self.tables["runs"]}

    def has(self, run: Run, fingerprint: str) -> bool:
        """Return whether the results hold this run, made with the same settings."""
        known = self.runs.get(run)
        return known is not None and known["fingerprint"] == fingerprint

    def drop(self, runs: Iterable[Run]) -> None:
        gone = set(runs)
        for name, rows in self.tables.items():
            self.tables[name] = [row for row in rows if _run(row) not in gone]

    def add(self, run: Run, run_dir: Path, facts: Row) -> None:
        """Add a finished run, in place of an older one; ``facts`` are columns of runs.csv."""
        self.drop([run])
        key = {"seed": str(run[0]), "method": run[1]}
        records = read_metrics(run_dir / "metrics.jsonl")
        steps = [record for record in records if "step_time" in record]
        costs = {name: sum(r.get(source) or 0 for r in steps) for name, source in COSTS.items()}
        costs["seconds"] = round(costs["seconds"], 1)
        self.tables["runs"].append(_text(key | costs | facts))
        for record in steps:
            curves = {name: record.get(source) for name, source in CURVES.items()}
            self.tables["steps"].append(_text(key | {"step": record["step"], **curves}))
        for record in records:
            for modality, items in record.get("eval_items", {}).items():
                row = {"step": record["step"], "modality": modality, "items": items}
                row["accuracy"] = record["eval"][modality]
                self.tables["evals"].append(_text(key | row))

    def write(self) -> None:
        """Write all three files, each whole or not at all, ordered by seed and method.

        runs.csv comes last, so it holds no run whose other lines are missing.
        """
        make_folder(self.folder)
        for name, columns in reversed(FILES.items()):
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
            writer.writeheader()
            rows: list[Row] = sorted(self.tables[name], key=_run)
            writer.writerows(rows)
            write_durably(self.folder / f"{name}.csv", text.getvalue())

    # ---- what statistics are made of ----

    def methods(self) -> list[str]:
        return sorted({method for _, method in self.runs})

    def seeds(self, *methods: str) -> list[int]:
        """Return the seeds that every one of these methods was run with."""
        of = [{seed for seed, name in self.runs if name == method} for method in methods]
        return sorted(set.intersection(*of)) if of else []

    def eval_steps(self) -> list[int]:
        return sorted({int(row["step"]) for row in self.tables["evals"]})

    def modalities(self) -> list[str]:
        return list(dict.fromkeys(row["modality"] for row in self.tables["evals"]))

    def correct(
        self, method: str, seeds: Sequence[int], step: int, modalities: Sequence[str]
    ) -> np.ndarray:
        """Return 1 for right and 0 for wrong answers: (seeds, modalities, items)."""
        found = {
            (int(row["seed"]), row["modality"]): [int(x) for x in row["items"]]
            for row in self.tables["evals"]
            if row["method"] == method and int(row["step"]) == step
        }
        return np.array([[found[seed, modality] for modality in modalities] for seed in seeds])

    def curve(self, method: str, column: str) -> tuple[list[int], np.ndarray]:
        """Return the steps, and a column of steps.csv as (seeds, steps)."""
        rows = [row for row in self.tables["steps"] if row["method"] == method]
        steps = sorted({int(row["step"]) for row in rows})
        at = {(int(r["seed"]), int(r["step"])): float(r[column] or "nan") for r in rows}
        seeds = sorted({seed for seed, _ in at})
        return steps, np.array([[at[seed, step] for step in steps] for seed in seeds])

    def cost(self, method: str, column: str) -> float:
        """Return the mean over the seeds of a column of runs.csv."""
        values = [float(row[column]) for row in self.tables["runs"] if row["method"] == method]
        return sum(values) / len(values)


def _run(row: Row) -> Run:
    return int(row["seed"]), row["method"]


def _read(path: Path) -> list[Row]:
    """Return the rows of a file; raise KepoDataError if they are not what `Results.write` wrote."""
    if not path.exists():
        return []
    columns = FILES[path.stem]
    with naming(path):
        text = path.read_bytes()
    try:
        reader = csv.DictReader(io.StringIO(text.decode("utf-8"), newline=""), strict=True)
        rows = list(reader)
        whole = tuple(reader.fieldnames or ()) == columns and all(_is_whole(row) for row in rows)
    except (ValueError, csv.Error):
        whole = False
    if not whole:
        raise KepoDataError(
            f"{path} is damaged; restore it, or remove it and the other results beside it to have "
            "them made again"
        )
    return rows


def _is_whole(row: Row) -> bool:
    """Return whether a row has every column, and only 0 and 1 as items.

    Raises ValueError if there is no number where one belongs.
    """
    if None in row or None in row.values():
        return False
    for name in row.keys() & {"seed", "step"}:
        int(row[name])
    for name in row.keys() & ({"accuracy"} | COSTS.keys() | CURVES.keys()):
        float(row[name] or "nan")
    return set(row.get("items", "")) <= {"0", "1"}


def _text(row: Row) -> Row:
    return {
        name: "" if x is None else f"{x:.5g}" if isinstance(x, float) else str(x)
        for name, x in row.items()
    }
