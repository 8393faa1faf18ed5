"""What statistics are made of: the results of a setting and a split, as arrays."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.results import KEY, Results, Run, read_rows, run_of
from experiments.starts import QUESTIONS
from kepo.digits.dataset import MODALITIES
from kepo.digits.demo import SOURCE
from kepo.errors import KepoDataError

UNLEARNED = "inverted"
"""A rendering that nobody learns, the teacher included; it is told apart."""
OOD = tuple(name for name in MODALITIES if name not in (SOURCE, UNLEARNED))
"""The renderings that out-of-domain accuracy is the mean of: they are never trained on."""
EVERY = "every", "seen", "unseen"
"""Kinds of questions: all, those whose digits the warm-up showed, those with another digit."""


class Scores:
    """The runs of one split in a folder of results."""

    def __init__(self, folder: Path, split: str):
        results = Results(folder)
        self.rows = {run: row for run, row in results.runs.items() if run.split == split}
        path = folder.parent / "questions.csv"
        if self.rows and not path.exists():
            raise KepoDataError(f"{path} is missing; restore it: the results are about it")
        self._large = {
            row["modality"]: _digits(row["large"]) == 1
            for row in read_rows(path, QUESTIONS)
            if row["split"] == split
        }
        self._right: dict[Run, dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
        for row in results.tables["evals"]:
            if run_of(row) in self.rows:
                at = self._right[run_of(row)].setdefault(int(row["step"]), {})
                at[row["modality"]] = _digits(row["items"])
        self._samples: dict[Run, dict[str, np.ndarray]] = defaultdict(dict)
        for row in results.tables["samples"]:
            self._samples[run_of(row)][row["modality"]] = _digits(row["right"])
        self._curves: dict[Run, list[dict[str, float]]] = defaultdict(list)
        for row in results.tables["curves"]:
            numbers = {name: float(x or "nan") for name, x in row.items() if name not in KEY}
            self._curves[run_of(row)].append(numbers)
        self.split = split

    # ---- which runs there are ----

    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.rows))

    def seeds(self, *methods: str) -> list[int]:
        """Return the seeds that every one of these methods was run with."""
        of = [{run.seed for run in self.rows if run.method == method} for method in methods]
        return sorted(set.intersection(*of)) if of else []

    def steps(self, method: str) -> list[int]:
        """Return the steps after which a method was evaluated."""
        return sorted(self._right[self._run(method, self.seeds(method)[0])])

    # ---- accuracy ----

    def right(
        self, method: str, seeds: Sequence[int], modalities: Sequence[str] = OOD, step: int = -1
    ) -> np.ndarray:
        """Return 1 for right and 0 for wrong answers: (seeds, modalities, items). Step -1 is the
        last."""
        at = self.steps(method)[-1] if step < 0 else step
        runs = [self._right[self._run(method, seed)][at] for seed in seeds]
        return np.array([[run[modality] for modality in modalities] for run in runs])

    def accuracy(
        self,
        method: str,
        seeds: Sequence[int],
        modalities: Sequence[str] = OOD,
        *,
        kind: str = "every",
        step: int = -1,
    ) -> np.ndarray:
        """Return the mean over the modalities of the accuracy on a kind of questions: (seeds,)."""
        right = self.right(method, seeds, modalities, step)
        return np.mean(
            [
                right[:, place, self._of(kind, name)].mean(1)
                for place, name in enumerate(modalities)
            ],
            axis=0,
        )

    def curve(
        self,
        method: str,
        seeds: Sequence[int],
        modalities: Sequence[str] = OOD,
        *,
        kind: str = "every",
    ) -> np.ndarray:
        """Return the accuracy at every evaluation, the start included: (seeds, evaluations)."""
        steps = self.steps(method)
        return np.stack(
            [self.accuracy(method, seeds, modalities, kind=kind, step=s) for s in steps], axis=1
        )

    def area(
        self, method: str, seeds: Sequence[int], modalities: Sequence[str] = OOD
    ) -> np.ndarray:
        """Return the mean accuracy over all steps, straight between evaluations: (seeds,)."""
        steps, curve = self.steps(method), self.curve(method, seeds, modalities)
        return np.trapezoid(curve, steps, axis=1) / (steps[-1] - steps[0])

    def drawdown(
        self,
        method: str,
        seeds: Sequence[int],
        modalities: Sequence[str] = OOD,
        *,
        kind: str = "every",
    ) -> np.ndarray:
        """Return the largest fall from any evaluation, the start included, to a later one:
        (seeds,)."""
        curve = self.curve(method, seeds, modalities, kind=kind)
        return (np.maximum.accumulate(curve, axis=1) - curve).max(1)

    def passes(
        self, method: str, seeds: Sequence[int], modalities: Sequence[str] = OOD
    ) -> np.ndarray:
        """Return the share of questions of which one of the samples is right: (seeds,)."""
        runs = [self._samples[self._run(method, seed)] for seed in seeds]
        return np.array([np.mean([run[name] > 0 for name in modalities]) for run in runs])

    # ---- cost ----

    def course(self, method: str, seeds: Sequence[int], column: str) -> np.ndarray:
        """Return a column of curves.csv at every evaluation after the start: (seeds,
        evaluations)."""
        runs = [self._curves[self._run(method, seed)] for seed in seeds]
        return np.array([[row[column] for row in run] for run in runs])

    def cost(self, method: str, column: str) -> float:
        """Return the mean over the seeds of a column of runs.csv."""
        return statistics.fmean(
            float(row[column]) for run, row in self.rows.items() if run.method == method
        )

    def at_equal(
        self, columns: Sequence[str], method: str, other: str, seeds: Sequence[int]
    ) -> np.ndarray:
        """Return the difference of OOD accuracy where both runs of a seed have spent as much as the
        cheaper one in all: (seeds,). The cost is the sum of the columns; between evaluations
        accuracy is taken as straight. It is NaN where one of them has no such cost."""
        found = []
        for seed in seeds:
            spent = {name: self._spent(name, seed, columns) for name in (method, other)}
            budget = min(x[-1] for x in spent.values())
            ours, theirs = (
                np.interp(budget, spent[name], self.curve(name, [seed])[0])
                for name in (method, other)
            )
            found.append(ours - theirs if budget else np.nan)
        return np.array(found)

    def _spent(self, method: str, seed: int, columns: Sequence[str]) -> np.ndarray:
        sums = sum(self.course(method, [seed], column)[0] for column in columns)
        return np.concatenate([[0.0], np.asarray(sums)])

    # ---- places ----

    def _run(self, method: str, seed: int) -> Run:
        return Run(self.split, seed, method)

    def _of(self, kind: str, modality: str) -> np.ndarray:
        large = self._large[modality]
        return {"every": np.ones_like(large), "seen": ~large, "unseen": large}[kind]


def _digits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")
