"""Compare methods on the scanned digits, under the single-source protocol.

    python -m experiments.compare --block tune     # on the validation split
    python -m experiments.choose                   # what is best there
    python -m experiments.compare --block main factorial
    python -m experiments.compare --methods kepo --steps 20 --out runs/try
    python -m experiments.page                     # the page and its picture

For every seed one student is warmed up. Every method starts from it, with the same questions and
length, trains it on the first rendering of the digits, and is tested on all eight. Results are
added to experiments/results/<setting>/ run by run; a run that they hold is not made again. After
--minutes no new run starts; the same command continues with the runs that are missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from experiments import starts
from experiments.choose import CHOSEN, Choice, read_choice
from experiments.methods import config_of, method_of
from experiments.plan import BEST_NEW, BLOCKS, SPLITS, Block
from experiments.pool import Pool
from experiments.results import SAMPLES, Results, Run
from experiments.settings import SETTINGS
from experiments.starts import Questions
from kepo.config import MAY_CHANGE_ON_RESUME, PATHS, Config
from kepo.digits.demo import SOURCE
from kepo.errors import KepoConfigError, KepoError, command
from kepo.flags import command_line
from kepo.words import at_home

DECIDES_NOTHING = {*PATHS, *MAY_CHANGE_ON_RESUME} - {"eval_every"}


@dataclass(frozen=True)
class Compare:
    """Settings of the comparison: which runs, and how long they are."""

    block: tuple[str, ...] = ()
    """Names of experiments.plan.BLOCKS, in the order in which they are run; none is main."""
    methods: tuple[str, ...] = ()
    """Methods to run instead of a block: names of experiments.methods.METHODS, with changes as in
    kepo@lr=2e-4,num_hinted=1. Setting, split and seeds below are theirs."""
    setting: str = "cliff"
    """Setting of these methods, one of experiments.settings.SETTINGS."""
    split: str = "validation"
    """Questions that these methods are evaluated on: validation or test."""
    seeds: tuple[int, ...] = (11, 12)
    """Seeds of these methods: of warm-up, data order and sampling."""
    steps: int = 100
    """Optimiser steps of every run."""
    eval_every: int = 10
    """Steps between evaluations."""
    train_questions: int = 1200
    """Training questions per rendering."""
    eval_questions: int = 100
    """Questions per rendering of the validation split, and of the test split."""
    data_seed: int = 100
    """Seed of the questions; the demonstration, on which settings were tried, has 0."""
    root: str = "runs/compare"
    """Folder of data, models and runs."""
    out: str = "experiments/results"
    """Folder of the results."""
    replace: bool = False
    """Whether a run that the results hold with other settings is made again in its place. It is
    refused otherwise."""
    chosen: str = str(CHOSEN)
    """File of the learning rates and coefficients that were chosen, as experiments.choose makes
    it."""
    jobs: int = 0
    """Runs at a time, one thread each. 0 means one per core."""
    minutes: float = 90.0
    """No new run starts after so many minutes; teachers and students are made whatever it says."""


@dataclass(frozen=True)
class Sweep:
    """A comparison's settings with what was chosen: what decides the numbers of its runs."""

    settings: Compare
    choice: Choice

    @cached_property
    def questions(self) -> Questions:
        s = self.settings
        return Questions(s.train_questions, s.eval_questions, s.eval_questions, s.data_seed)

    @property
    def root(self) -> Path:
        return Path(self.settings.root)

    def config(self, setting: str, run: Run) -> Config:
        """Return the config of a run."""
        made = SETTINGS[setting]
        folder = self.root / "runs" / setting / run.split / f"seed-{run.seed}"
        return self._config(
            run,
            student=str(starts.student_of(self.root, made, self.questions, run.seed)),
            teacher=str(starts.teacher_of(self.root, made, self.questions)),
            train_data=str(self.root / "data" / "train"),
            eval_data=str(self.root / "data" / run.split),
            run_dir=str(folder / self.fingerprint(setting, run)),
        )

    def fingerprint(self, setting: str, run: Run) -> str:
        """Return a digest of all that decides a run except its machine: runs with the same digest
        need not be made twice."""
        config = self._config(run, teacher="any")
        default = dataclasses.asdict(Config())
        # Defaults are left out, so that a setting added to Config later does not void old results.
        facts = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in DECIDES_NOTHING and value != default[name]
        }
        made = SETTINGS[setting]
        facts |= {"student": starts.student_facts(made, self.questions, run.seed)}
        if config.teacher is not None:
            facts |= {"teacher": starts.teacher_facts(made, self.questions)}
        return starts.digest(facts | {"split": run.split, "samples": SAMPLES})

    def _config(self, run: Run, **paths: str) -> Config:
        return config_of(
            run.method,
            self.choice.methods,
            train_modalities=[SOURCE],
            eval_every=self.settings.eval_every,
            steps=self.settings.steps,
            seed=run.seed,
            save_every=25,
            keep_checkpoints=1,
            device="cpu",
            **paths,
        )


def compare(settings: Compare) -> None:
    """Make all runs that the results lack, as far as the time goes."""
    until = time.monotonic() + 60 * settings.minutes
    settings = at_home(settings, "root", "out", "chosen")
    _check(settings)
    sweep = Sweep(settings, read_choice(Path(settings.chosen)))
    results = {name: Results(Path(settings.out) / name) for name in SETTINGS}
    missing: dict[tuple[str, Run], Config] = {}
    for block in blocks_of(settings):
        for run in runs_of(block, sweep.choice):
            if not results[block.setting].has(run, sweep.fingerprint(block.setting, run)):
                missing[block.setting, run] = sweep.config(block.setting, run)
    if not settings.replace:
        _refuse_other_settings(missing, results)
    print(f"{len(missing)} runs are missing", flush=True)
    if missing:
        with contextlib.closing(Pool(settings.jobs)) as pool:
            _run_all(sweep, missing, results, pool, until)


def blocks_of(settings: Compare) -> list[Block]:
    """Return the blocks that are asked for; methods that are named make one."""
    if not settings.methods:
        return [BLOCKS[name] for name in settings.block or ("main",)]
    asked = (settings.setting, settings.split, settings.methods, settings.seeds)
    return [Block("named", *asked, "asked for by name")]


def runs_of(block: Block, choice: Choice) -> list[Run]:
    """Return the runs of a block, those with the same start together."""
    methods = [choice.new if name == BEST_NEW else name for name in block.methods]
    return [Run(block.split, seed, method) for seed in block.seeds for method in methods]


def _run_all(
    sweep: Sweep,
    missing: Mapping[tuple[str, Run], Config],
    results: Mapping[str, Results],
    pool: Pool,
    until: float,
) -> None:
    root, questions = sweep.root, sweep.questions
    data = starts.make_data(root, questions)
    teachers = {
        config.teacher: setting for (setting, _), config in missing.items() if config.teacher
    }
    students = {config.student: (setting, run.seed) for (setting, run), config in missing.items()}
    print(f"making {len(teachers)} teachers and {len(students)} students", flush=True)
    for_teachers = [(root, data, name, questions) for name in teachers.values()]
    pool.map(starts.make_teacher, for_teachers, "teachers")
    for_students = [(root, data, *which, questions) for which in students.values()]
    pool.map(starts.make_student, for_students, "students")
    out = Path(sweep.settings.out)
    starts.write_facts(out, data, {Path(t): SETTINGS[name] for t, name in teachers.items()})
    sums = {folder: starts.sha256(Path(folder)) for folder in [*teachers, *students]}
    _refuse_other_students(missing, results)

    def keep(named: tuple[str, Run]) -> None:
        setting, run = named
        config = missing[named]
        facts = {"student": sums[config.student], "teacher": sums.get(config.teacher or "", "")}
        facts |= {"fingerprint": sweep.fingerprint(setting, run), **_provenance()}
        results[setting].add(run, Path(config.run_dir), facts)
        results[setting].write()
        shutil.rmtree(Path(config.run_dir) / "checkpoints")  # what is asked of it is written down

    failed = pool.train_all(missing, keep, until)
    if failed:
        (setting, run), fault = next(iter(failed.items()))
        raise KepoError(
            f"methods: {len(failed)} runs failed, the first of them {run.method!r} with the seed "
            f"{run.seed} in {setting}: {fault}"
        )


def _refuse_other_settings(
    missing: Mapping[tuple[str, Run], Config], results: Mapping[str, Results]
) -> None:
    """Raise KepoConfigError if results hold one of these runs: it was made with other settings."""
    for setting, run in missing:
        if run in results[setting].runs:
            raise KepoConfigError(
                f"out has {run.method!r} with the seed {run.seed} on the {run.split} split, made "
                f"with other settings, in {results[setting].folder}; name another out, or "
                "--replace to have it made again in its place"
            )


def _refuse_other_students(
    missing: Mapping[tuple[str, Run], Config], results: Mapping[str, Results]
) -> None:
    """Raise KepoConfigError if results hold runs of a seed whose student answered otherwise before
    the first step: methods are compared within a seed, from one start.

    Made again on another kind of processor a student has other bits. It is the same start if it
    answers every question of the split alike.
    """
    before = {
        (setting, split): results[setting].first_answers(split)
        for setting, split in {(setting, run.split) for setting, run in missing}
    }
    for (setting, run), config in missing.items():
        here = starts.answers_of(Path(config.student))[run.split]
        there = before[setting, run.split].get(run.seed, here)
        if different := starts.differences(here, there):
            raise KepoConfigError(
                f"seeds has {run.seed}, whose runs in {results[setting].folder} started from a "
                f"student that answers {different} questions otherwise than {config.student}, made "
                "here; take other seeds, or another out"
            )


@cache
def _provenance() -> dict[str, str]:
    """Return columns of runs.csv: the code, and where it ran."""
    import torch

    return {
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Return the commit, and whether code was changed since; the results may have been."""
    code = [":(top,glob)kepo*/**/*.py", ":(top,glob)csrc/*", ":(top,glob)experiments/*.py"]
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *code])
    try:
        commit, changed = (
            subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _check(settings: Compare) -> None:
    known: dict[str, tuple[tuple[str, ...], Any]] = {
        "block": (settings.block, BLOCKS),
        "setting": ((settings.setting,), SETTINGS),
        "split": ((settings.split,), SPLITS),
    }
    for name, (given, names) in known.items():
        if unknown := [x for x in given if x not in names]:
            raise KepoConfigError(f"{name} has {unknown}; known are {', '.join(names)}")
    for spelling in settings.methods:
        method_of(spelling)
    if settings.methods and settings.block:
        raise KepoConfigError(
            f"block has {list(settings.block)} beside methods={list(settings.methods)}; name one "
            "of the two"
        )
    for name in ("setting", "split", "seeds") if not settings.methods else ():
        if getattr(settings, name) != getattr(Compare, name):
            raise KepoConfigError(
                f"{name}={getattr(settings, name)!r} is of methods, and none is named; a block has "
                "its own"
            )
    for name in ("steps", "eval_every", "train_questions", "eval_questions"):
        if getattr(settings, name) < 1:
            raise KepoConfigError(f"{name}={getattr(settings, name)}; expected a number >= 1")
    for name in ("jobs", "minutes", "data_seed"):
        if not getattr(settings, name) >= 0:
            raise KepoConfigError(f"{name}={getattr(settings, name)}; expected a number >= 0")
    if not settings.seeds:
        raise KepoConfigError("seeds is empty; expected one at least")


def main() -> None:
    [settings] = command_line(Compare, prog="python -m experiments.compare", description=__doc__)
    compare(settings)


if __name__ == "__main__":
    try:
        command(main)()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it stopped")
        sys.exit(130)
