"""The embedded demonstration: a tiny vision-language model learns to add two scanned digits.

    data -> teacher -> student's warm-up -> KEPO -> table and curves

Everything is made on the spot from scikit-learn's scans and kept under `root`. After an
interruption, the same command continues where it stopped. The student is warmed up and then trained
on only one rendering of the digits; the table shows what that does for the seven it has never seen
(the single-source protocol of the paper, in miniature).

With --scans, the same is done on slices of a brain, with settings of its own: kepo demo --scans
--help lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.digits.dataset import MODALITIES, write_digits
from kepo.digits.tiny import build_tiny
from kepo.evaluation.answers import means, summary
from kepo.flags import command_line
from kepo.miniature.stages import (
    Made,
    Miniature,
    columns,
    interruptible,
    outputs,
    print_rows,
    run_stages,
    supervise,
)
from kepo.words import at_home

SOURCE = next(iter(MODALITIES))
COMPLETION_TOKENS = 24

DIGITS_RUN: dict[str, Any] = dict(
    # More questions and fewer answers to each than usual: the model has to learn to see, and for
    # that the number of different images counts.
    prompts_per_step=32,
    num_generations=4,
    micro_batch=64,
    max_completion_length=COMPLETION_TOKENS,
    lr=4e-4,
    lr_end=0.1,
    warmup_steps=10,
    # A JSD is about five times smaller than a KL, and on right answers smaller still.
    distill_coef=10.0,
)
"""The settings of a run on the digits, in the demonstration and in the comparison."""


@dataclass(frozen=True)
class Demo:
    """Settings of the demonstration. Change any of them together with root."""

    root: str = "runs/demo"
    """Folder of everything the demonstration makes."""
    train_questions: int = 1200
    """Training questions per rendering."""
    test_questions: int = 100
    """Test questions per rendering, about scans that no training question shows."""
    teacher_steps: int = 350
    """Supervised steps of the teacher, on all renderings."""
    warmup_steps: int = 240
    """Supervised steps of the student, on the first rendering."""
    supervised_batch: int = 32
    """Answers per supervised step."""
    supervised_lr: float = 1e-3
    """Peak learning rate of supervised training."""
    hint_fraction: float = 0.4
    """Share of supervised answers that are about hints."""
    steps: int = 130
    """KEPO steps."""
    lr: float = 4e-4
    """Peak learning rate of KEPO."""
    seed: int = 0
    """Seed of everything."""


def run(demo: Demo) -> int:
    """Run all stages; return the exit code of the training."""
    demo = at_home(demo, "root")
    return run_stages(demo, miniature_of(demo))


def miniature_of(demo: Demo) -> Miniature:
    """Return what the stages ask of this demonstration."""

    def config(made: Made, lr: float | None) -> Config:
        asked = demo if lr is None else replace(demo, lr=lr)
        return config_of(asked, made.data, made.teacher, made.student)

    return Miniature(
        source=SOURCE,
        data_settings=("train_questions", "test_questions"),
        make_data=lambda folder: make_data(folder, demo),
        build=lambda folder, data, size: build_tiny(folder, size=size, seed=demo.seed),
        config=config,
        report=lambda made: report(Path(demo.root), made.teacher, made.data),
    )


def config_of(demo: Demo, data: Path, teacher: Path, student: Path) -> Config:
    """Return the demonstration's training config; it uses the same loop and settings as any run."""
    return Config(
        student=str(student),
        teacher=str(teacher),
        train_data=str(data / "train"),
        train_modalities=(SOURCE,),
        eval_data=str(data / "test"),
        run_dir=demo.root,
        steps=demo.steps,
        num_hinted=1,
        max_attempts=2,
        seed=demo.seed,
        save_every=10,
        eval_every=0,
        device="cpu",  # whose runs are the same bit for bit, and fast enough for so small a model
        **{**DIGITS_RUN, "lr": demo.lr},
    )


def make_data(folder: Path, demo: Demo) -> None:
    print(f"data: {demo.train_questions} + {demo.test_questions} questions in each of "
          f"{len(MODALITIES)} renderings", flush=True)  # fmt: skip
    write_digits(folder, train=demo.train_questions, test=demo.test_questions, seed=demo.seed)


def make_teacher(folder: Path, data: Path, demo: Demo) -> None:
    build_tiny(folder, size="teacher", seed=demo.seed)
    supervise(folder, load_omnimedvqa(data / "train"), demo.teacher_steps, demo, "teacher")


def report(root: Path, teacher: Path, data: Path) -> None:
    """Print the accuracy per rendering of the student before and after KEPO, and of the teacher;
    write it to accuracy.json."""
    asked = load_omnimedvqa(data / "test")
    found = columns(root, teacher, asked, COMPLETION_TOKENS, means)
    before, after, of_teacher = found
    rows = [
        (name + "  (trained on)" * (name == SOURCE), before[name], after[name], of_teacher[name])
        for name in after
    ]
    unseen = [summary(column, SOURCE)[1] for column in found]
    rows.append(("mean of the seven unseen", unseen[0], unseen[1], unseen[2]))
    print_rows("greedy accuracy, unseen scans", rows)
    print(f"\n{outputs(root)}")


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo demo``; return its exit code."""
    [demo] = command_line(Demo, prog="kepo demo", args=arguments, description=__doc__)
    print(f"settings: {dataclasses.asdict(demo)}")
    return interruptible(lambda: run(demo))
