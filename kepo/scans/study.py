"""The medical miniature: tiny models answer questions about pieces of one average brain.

    data -> teacher -> student's warm-up -> KEPO -> table, curves and report

The pictures are cut from the ICBM-152 brain, which comes with nilearn. The student is warmed up and
trained on axial T1 slices alone; the teacher has seen all six modalities. The table shows what that
does for T1 in the two other planes, which was measured, and for PD, T2 and FLAIR, which are
simulated. It is one average brain: there are no patients in it and no findings. The test's pieces
come from other parts of it than those of training, and share no voxel with them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from kepo.config import Config
from kepo.data.load import Example, load_omnimedvqa
from kepo.flags import command_line
from kepo.miniature.stages import (
    Made,
    Miniature,
    columns,
    interruptible,
    outputs,
    print_rows,
    run_stages,
)
from kepo.miniature.tiny_models import Size, texts_about, write_tiny
from kepo.report.command import write_report
from kepo.scans.scan_files import write_scans
from kepo.scans.scan_questions import KINDS, MODALITIES, SOURCE
from kepo.words import at_home

COMPLETION_TOKENS = 32

SCANS_RUN: dict[str, Any] = dict(
    prompts_per_step=32,
    num_generations=4,
    micro_batch=128,
    max_completion_length=COMPLETION_TOKENS,
    lr_end=0.1,
    warmup_steps=10,
    distill_coef=10.0,
)
"""The settings of a run on the scans. They, and the defaults below, were chosen on the validation's
pieces: benchmarks/results/scans_pilots_2026-11-28.csv."""


@dataclass(frozen=True)
class Scans:
    """Settings of the medical miniature. Change any of them together with root."""

    root: str = "runs/scans"
    """Folder of everything the demonstration makes."""
    train_questions: int = 2400
    """Training questions per modality."""
    test_questions: int = 120
    """Held-out questions per modality."""
    held_out: Literal["validation", "test"] = "test"
    """The held-out part of the brain that is asked about. Settings were chosen on validation."""
    teacher_steps: int = 1200
    """Supervised steps of the teacher, on all modalities."""
    warmup_steps: int = 120
    """Supervised steps of the student, on axial T1."""
    supervised_batch: int = 32
    """Answers per supervised step."""
    supervised_lr: float = 2e-3
    """Peak learning rate of supervised training."""
    hint_fraction: float = 0.4
    """Share of supervised answers that are about hints."""
    steps: int = 130
    """KEPO steps."""
    lr: float = 8e-4
    """Peak learning rate of KEPO."""
    seed: int = 0
    """Seed of everything."""


def run(study: Scans) -> int:
    """Run all stages; return the exit code of the training."""
    study = at_home(study, "root")
    return run_stages(study, miniature_of(study))


def miniature_of(study: Scans) -> Miniature:
    """Return what the stages ask of this demonstration."""
    return Miniature(
        source=SOURCE,
        data_settings=("train_questions", "test_questions", "held_out"),
        make_data=lambda folder: make_data(folder, study),
        build=lambda folder, data, size: build(folder, data, size, study.seed),
        config=lambda made, lr: config_of(study if lr is None else replace(study, lr=lr), made),
        report=lambda made: report(study, made),
    )


def make_data(folder: Path, study: Scans) -> None:
    counts = {"train": study.train_questions, study.held_out: study.test_questions}
    print(f"data: {study.train_questions} + {study.test_questions} questions in each of "
          f"{len(MODALITIES)} modalities", flush=True)  # fmt: skip
    write_scans(folder, counts, study.seed)


def build(folder: Path, data: Path, size: Size, seed: int) -> None:
    """Write a random model that knows the words of the training questions."""
    worded: dict[tuple[str, str], Example] = {}
    for example in load_omnimedvqa(data / "train"):
        worded.setdefault((example.question_type, example.rationale), example)
    write_tiny(folder, texts_about([*worded.values()]), size=size, seed=seed)


def config_of(study: Scans, made: Made) -> Config:
    """Return the training config; it uses the same loop and settings as any run."""
    return Config(
        student=str(made.student),
        teacher=str(made.teacher),
        train_data=str(made.data / "train"),
        train_modalities=(SOURCE,),
        eval_data=str(made.data / study.held_out),
        run_dir=study.root,
        steps=study.steps,
        lr=study.lr,
        num_hinted=1,
        max_attempts=2,
        seed=study.seed,
        save_every=10,
        eval_every=0,
        device="cpu",  # whose runs are the same bit for bit, and fast enough for so small a model
        **SCANS_RUN,
    )


def report(study: Scans, made: Made) -> None:
    """Print the accuracy per modality and type of question, write it to accuracy.json, and make the
    report page if its packages are there."""
    root, asked = Path(study.root), load_omnimedvqa(made.data / study.held_out)
    found = columns(
        root, made.teacher, asked, COMPLETION_TOKENS, lambda items: by_cell(asked, items)
    )
    rows: list[tuple[str, float, float, float]] = []
    for modality in MODALITIES:
        kinds = [kind for kind in KINDS if f"{modality}: {kind}" in found[0]]
        name = modality + "  (trained on)" * (modality == SOURCE)
        rows.append((name, *(of_modality(column, modality) for column in found)))  # type: ignore[arg-type]
        rows += [(f"    {kind}", *(c[f"{modality}: {kind}"] for c in found)) for kind in kinds]  # type: ignore[misc]
    rows.append(("mean of the five unseen", *map(unseen, found)))  # type: ignore[arg-type]
    print_rows(f"greedy accuracy, {study.held_out} pieces", rows)
    print("PD, T2 and FLAIR are simulated; one average brain, no patients")
    print(f"\n{outputs(root)}")
    if find_spec("jinja2") and find_spec("plotly"):
        print(f"page with the pictures: {write_report([root])}")
    else:
        print(f"page with the pictures: pip install 'kepo[report]', then kepo report {root}")


def by_cell(asked: Sequence[Example], items: dict[str, list[float]]) -> dict[str, float]:
    """Return the accuracy of each modality's questions of each type, by "modality: type"."""
    left = {modality: iter(values) for modality, values in items.items()}
    cells: dict[str, list[float]] = {}
    for example in asked:
        name = f"{example.modality}: {example.question_type}"
        cells.setdefault(name, []).append(next(left[example.modality]))
    return {name: statistics.fmean(values) for name, values in cells.items()}


def of_modality(column: dict[str, float], modality: str) -> float:
    """Return the mean over the types of questions of a modality, each as much."""
    return statistics.fmean(x for name, x in column.items() if name.startswith(f"{modality}: "))


def unseen(column: dict[str, float]) -> float:
    """Return the mean over the modalities that the student was not trained on, each as much."""
    return statistics.fmean(of_modality(column, name) for name in MODALITIES if name != SOURCE)


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo demo --scans``; return its exit code."""
    [study] = command_line(Scans, prog="kepo demo --scans", args=arguments, description=__doc__)
    print(f"settings: {dataclasses.asdict(study)}")
    return interruptible(lambda: run(study))
