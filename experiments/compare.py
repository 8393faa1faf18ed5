"""Compare methods on the scanned digits, under the single-source protocol.

    python -m experiments.compare                # 5 methods, 5 seeds: hours
    python -m experiments.compare --methods grpo kepo --seeds 0 1 --steps 20
    python -m experiments.compare --methods gate_only hints_only --seeds 0 1 2
    python -m experiments.compare --report-only  # tables and pictures

For every seed one student is warmed up. Every method starts from it, with the same questions,
number of samples, learning rate and length, trains it on the first rendering of the digits, and is
tested on all eight. Results are added to docs/experiments/<setting>/ run by run. After an
interruption, the same command continues with the runs that those files lack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.methods import MAIN, METHODS, SETTINGS, config_of
from experiments.pool import Pool, quiet
from experiments.report import write_report
from experiments.results import Results, Run
from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.digits.demo import SOURCE, Demo, make_data, make_teacher
from kepo.errors import KepoConfigError, command
from kepo.flags import command_line
from kepo.miniature.stages import cached
from kepo.words import at_home

WARMUP_LR = 1e-3
WARMUP_BATCH = 32
PATHS = ("student", "teacher", "train_data", "eval_data", "run_dir")


@dataclass(frozen=True)
class Compare:
    """Settings of the comparison: the methods, and the length of their runs."""

    setting: str = "cliff"
    """cliff: a third of the groups fail entirely at the start. mild: the demonstration's start."""
    methods: tuple[str, ...] = tuple(MAIN)
    """Names from experiments.methods.METHODS."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of warm-up, data order and sampling."""
    steps: int = 100
    """Optimiser steps of every run."""
    eval_every: int = 25
    """Steps between evaluations."""
    train_questions: int = 1200
    """Training questions per rendering."""
    test_questions: int = 100
    """Test questions per rendering, the same for all runs."""
    teacher_steps: int = 350
    """Supervised steps of the teacher, on all renderings; there is one for all seeds."""
    root: str = "runs/compare"
    """Folder of data, models and runs."""
    out: str = "docs/experiments"
    """Folder of the results."""
    jobs: int = 0
    """Runs at a time, one thread each. 0 means one per core."""
    report_only: bool = False
    """Run nothing; make the report from the existing results."""


def compare(settings: Compare) -> None:
    """Make all runs that the results lack, then the report."""
    settings = at_home(settings, "root", "out")
    _check(settings)
    out = Path(settings.out) / settings.setting
    results = Results(out)
    if not settings.report_only:
        with contextlib.closing(Pool(settings.jobs)) as pool:
            _run_all(settings, results, pool)
    print(write_report(results, SETTINGS[settings.setting], out))


def _run_all(settings: Compare, results: Results, pool: Pool) -> None:
    missing = [
        (seed, method)
        for seed in settings.seeds
        for method in settings.methods
        if not results.has((seed, method), fingerprint(settings, seed, method))
    ]
    if not missing:
        return
    root = Path(settings.root)
    demo = _demo(settings)
    data = cached(root / "data", _made_with(settings, "data"), lambda to: make_data(to, demo))
    teacher = cached(
        root / "teacher", _made_with(settings, "teacher"), lambda to: make_teacher(to, data, demo)
    )
    seeds = sorted({seed for seed, _ in missing})
    warmups = {seed: root / settings.setting / f"seed-{seed}" / "warmup" for seed in seeds}
    print(f"warming up {len(seeds)} students", flush=True)
    pool.map(_warm_up, [(settings, seed, warmups[seed], data) for seed in seeds])
    start = {
        seed: {"warmup": _sha256(folder), "teacher": _sha256(teacher)}
        for seed, folder in warmups.items()
    }
    # The methods of a seed are comparable only if they have the same start.
    for (seed, method), row in list(results.runs.items()):
        if seed in start and any(row[name] != value for name, value in start[seed].items()):
            print(f"seed {seed}, {method}: made from other models than these; dropped")
            results.drop([(seed, method)])
            if method in settings.methods and (seed, method) not in missing:
                missing.append((seed, method))

    configs = {run: _config(settings, *run, data, teacher, warmups[run[0]]) for run in missing}

    def keep(run: Run) -> None:
        facts = _provenance() | start[run[0]] | {"fingerprint": fingerprint(settings, *run)}
        results.add(run, Path(configs[run].run_dir), facts)
        results.write()

    pool.train_all(configs, settings.steps, keep)


def fingerprint(settings: Compare, seed: int, method: str) -> str:
    """Return a digest of all that decides a run except its machine: runs with the same digest need
    not be made twice."""
    config = dataclasses.asdict(_as_method(settings, seed, method, teacher="any"))
    # Defaults are left out, so that a setting added to Config later does not void old results.
    default = dataclasses.asdict(Config())
    facts = {
        name: value
        for name, value in config.items()
        if name not in PATHS and value != default[name]
    }
    facts["distils"] = config["teacher"] is not None
    facts |= _made_with(settings, "data") | _made_with(settings, "teacher")
    facts |= _warmup_facts(settings, seed)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _warm_up(settings: Compare, seed: int, target: Path, data: Path) -> None:
    from kepo.digits.tiny import build_tiny
    from kepo.miniature.warm_up import train_supervised
    from kepo.models.vlm import VLM

    setting = SETTINGS[settings.setting]

    def make(folder: Path) -> None:
        build_tiny(folder, size="student", seed=seed)
        vlm = VLM.load(folder)
        every = load_omnimedvqa(data / "train", modalities=(SOURCE,))
        types = setting.warmup_question_types
        train_supervised(
            vlm,
            [e for e in every if types is None or e.question_type in types],
            steps=setting.warmup_steps,
            batch_size=WARMUP_BATCH,
            lr=WARMUP_LR,
            seed=seed,
            hint_fraction=setting.hint_fraction,
            hint_examples=every,
            progress=False,
        )
        vlm.save(folder)

    made_with = _made_with(settings, "data") | _warmup_facts(settings, seed)
    with quiet(target.parent / "warmup.log"):
        cached(target, made_with, make)


def _config(
    settings: Compare, seed: int, method: str, data: Path, teacher: Path, warmup: Path
) -> Config:
    folder = Path(settings.root) / settings.setting / f"seed-{seed}"
    return _as_method(
        settings,
        seed,
        method,
        student=str(warmup),
        teacher=str(teacher),
        train_data=str(data / "train"),
        eval_data=str(data / "test"),
        run_dir=str(folder / f"{method}-{fingerprint(settings, seed, method)}"),
    )


def _as_method(settings: Compare, seed: int, method: str, **paths: str) -> Config:
    return config_of(
        SETTINGS[settings.setting],
        METHODS[method],
        train_modalities=[SOURCE],
        eval_every=settings.eval_every,
        steps=settings.steps,
        seed=seed,
        save_every=20,
        keep_checkpoints=1,
        **paths,
    )


def _demo(settings: Compare) -> Demo:
    return Demo(
        root=settings.root,
        train_questions=settings.train_questions,
        test_questions=settings.test_questions,
        teacher_steps=settings.teacher_steps,
    )


def _made_with(settings: Compare, what: str) -> dict[str, object]:
    facts = {name: getattr(settings, name) for name in ("train_questions", "test_questions")}
    return facts if what == "data" else {**facts, "teacher_steps": settings.teacher_steps}


def _warmup_facts(settings: Compare, seed: int) -> dict[str, object]:
    setting = SETTINGS[settings.setting]
    types = setting.warmup_question_types
    return {
        "warmup_steps": setting.warmup_steps,
        "warmup_question_types": None if types is None else list(types),
        "hint_fraction": setting.hint_fraction,
        "warmup_lr": WARMUP_LR,
        "warmup_batch": WARMUP_BATCH,
        "seed": seed,
    }


def _provenance() -> dict[str, str]:
    import torch

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parent
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        described = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        described = "unknown"
    return {
        "commit": described,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _sha256(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


def _check(settings: Compare) -> None:
    for name, given, known in (
        ("setting", (settings.setting,), SETTINGS),
        ("methods", settings.methods, METHODS),
    ):
        if unknown := [x for x in given if x not in known]:
            raise KepoConfigError(f"{name} has {unknown}; known are {', '.join(known)}")
    for name in ("steps", "eval_every", "train_questions", "test_questions", "teacher_steps"):
        if getattr(settings, name) < 1:
            raise KepoConfigError(f"{name}={getattr(settings, name)}; expected >= 1")
    if settings.jobs < 0 or not settings.seeds:
        raise KepoConfigError(
            f"jobs={settings.jobs}, seeds={settings.seeds}; expected jobs >= 0 and a seed"
        )


def main() -> None:
    [settings] = command_line(Compare, prog="python -m experiments.compare", description=__doc__)
    compare(settings)


if __name__ == "__main__":
    try:
        command(main)()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it stopped")
        sys.exit(130)
