"""The embedded demonstration: a tiny vision-language model learns to add two scanned digits.

    data -> teacher -> student's warm-up -> KEPO -> table and curves

Everything is made on the spot from scikit-learn's scans and kept under `root`. After an
interruption, the same command continues where it stopped. The student is warmed up and then trained
on only one rendering of the digits; the table shows what that does for the seven it has never seen
(the single-source protocol of the paper, in miniature).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kepo.check import check_settings
from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.digits.dataset import MODALITIES, write_digits
from kepo.digits.tiny import build_tiny
from kepo.digits.warm_up import train_supervised
from kepo.disk.durable import as_json, write_durably
from kepo.disk.files import read_own, refuse_irregular
from kepo.distributed.processes import launched
from kepo.errors import KepoConfigError
from kepo.evaluation.answers import greedy_scores, means, summary
from kepo.flags import command_line
from kepo.loop import train
from kepo.models.reading import hide_transformers_bars
from kepo.models.vlm import VLM
from kepo.run.lock import WRITTEN
from kepo.run.manifest import new_folder, verify, write_manifest
from kepo.run.metrics import read_metrics
from kepo.tasks.multiple_choice import MultipleChoice
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
    hide_transformers_bars()
    if launched() > 1:
        raise KepoConfigError("kepo demo: it runs in one process; start it without torchrun")
    demo = at_home(demo, "root")
    refuse(demo)
    root = Path(demo.root)
    started = time.perf_counter()

    def stage(name: str, settings: tuple[str, ...], make: Callable[[Path], None]) -> Path:
        made_with = {key: getattr(demo, key) for key in (*settings, "seed")}
        return cached(root / name, made_with, make)

    supervised = ("supervised_batch", "supervised_lr", "hint_fraction", "train_questions")
    data = stage("data", ("train_questions", "test_questions"), lambda to: make_data(to, demo))
    teacher = stage(
        "teacher", ("teacher_steps", *supervised), lambda to: make_teacher(to, data, demo)
    )
    student = stage(
        "student", ("warmup_steps", *supervised), lambda to: make_student(to, data, demo)
    )
    print(f"KEPO: training on {SOURCE!r} only", flush=True)
    code = train(config_of(demo, data, teacher, student)).exit_code
    if code == 0:
        report(root, teacher, data)
        print(f"whole demonstration: {time.perf_counter() - started:.0f} s in this call")
    return code


def refuse(demo: Demo) -> None:
    """Raise KepoConfigError for any stage's setting that is out of range, and OSError if something
    is in the way of the run's files. This comes before the first stage, which takes minutes."""
    least = dict(train_questions=1, test_questions=1, teacher_steps=1, warmup_steps=1)
    for name, value in (least | dict(supervised_batch=1, seed=0)).items():
        if getattr(demo, name) < value:
            raise KepoConfigError(f"{name}={getattr(demo, name)}; expected a number >= {value}")
    if not 0 <= demo.hint_fraction <= 1:
        raise KepoConfigError(f"hint_fraction={demo.hint_fraction}; expected a number in [0, 1]")
    here = Path("not made yet")
    for lr in (demo.supervised_lr, demo.lr):
        check_settings(config_of(replace(demo, lr=lr), here, here, here))
    refuse_irregular(Path(demo.root), ("accuracy.json", *WRITTEN))


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
    _supervise(folder, "teacher", data, None, demo.teacher_steps, demo)


def make_student(folder: Path, data: Path, demo: Demo) -> None:
    _supervise(folder, "student", data, (SOURCE,), demo.warmup_steps, demo)


def _supervise(
    folder: Path,
    size: Literal["student", "teacher"],
    data: Path,
    modalities: tuple[str, ...] | None,
    steps: int,
    demo: Demo,
) -> None:
    build_tiny(folder, size=size, seed=demo.seed)
    vlm = VLM.load(folder)
    train_supervised(
        vlm,
        load_omnimedvqa(data / "train", modalities=modalities),
        steps=steps,
        batch_size=demo.supervised_batch,
        lr=demo.supervised_lr,
        seed=demo.seed,
        hint_fraction=demo.hint_fraction,
        desc=size,
    )
    vlm.save(folder)


def cached(target: Path, made_with: dict[str, object], make: Callable[[Path], None]) -> Path:
    """Return the folder ``target``; make it first if it is missing or damaged.

    A target that was made with other settings is refused, and so is a folder not made here.
    """
    record = target / "made_with.json"
    if target.exists():
        if not record.is_file():
            raise KepoConfigError(
                f"{target} is in the way: it has no {record.name}, so this command did not make "
                "it; use another root, or move it"
            )
        fault = verify(target)
        if fault is None:
            before = json.loads(record.read_text(encoding="utf-8"))
            if before == made_with:
                return target
            raise KepoConfigError(
                f"{target} was made with {before}, now asked for {made_with}; use another root, or "
                "remove it"
            )
        print(f"{target} is damaged ({fault}) and made again")
    with new_folder(target) as folder:
        make(folder)
        (folder / record.name).write_text(as_json(made_with), encoding="utf-8")
        write_manifest(folder)
    return target


def report(root: Path, teacher: Path, data: Path) -> None:
    """Print the accuracy per rendering of the student before and after KEPO, and of the teacher;
    write it to accuracy.json."""
    evaluations = [record for record in read_metrics(root / "metrics.jsonl") if "eval" in record]
    before, after = evaluations[0]["eval"], evaluations[-1]["eval"]
    picture, table = root / "curves.png", root / "accuracy.json"
    of_teacher = _known_teacher(table, after)
    if of_teacher is None:
        asked, limit = load_omnimedvqa(data / "test"), COMPLETION_TOKENS
        scores = greedy_scores(VLM.load(teacher), asked, MultipleChoice(), max_tokens=limit)
        of_teacher = means(scores)
    rows = [(name, before[name], after[name], of_teacher[name]) for name in after]
    unseen = [summary(column, SOURCE)[1] for column in (before, after, of_teacher)]
    found = {"before": before, "after": after, "teacher": of_teacher}
    write_durably(table, as_json(found, indent=1))

    title = "greedy accuracy, unseen scans"
    print(f"\n{title:34} {'before':>7} {'after':>7} {'gain':>7} {'teacher':>8}")
    rows.append(("mean of the seven unseen", unseen[0], unseen[1], unseen[2]))
    for name, old, new, best in rows:
        note = "  (trained on)" if name == SOURCE else ""
        print(f"{name + note:34} {old:7.3f} {new:7.3f} {new - old:+7.3f} {best:8.3f}")
    print(f"\ncurves: {picture}   metrics: {root / 'metrics.jsonl'}   table: {table}")


def _known_teacher(table: Path, after: dict[str, float]) -> dict[str, float] | None:
    """Return the teacher's accuracies from an earlier call's table; None unless the table is whole
    and of this run."""
    try:
        known = json.loads(read_own(table).decode("utf-8"))
        if known["after"] == after and known["teacher"].keys() == after.keys():
            return known["teacher"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # the table is made again
    return None


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo demo``; return its exit code."""
    [demo] = command_line(Demo, prog="kepo demo", args=arguments, description=__doc__)
    print(f"settings: {dataclasses.asdict(demo)}")
    try:
        return run(demo)
    except KeyboardInterrupt:  # in a stage before training; the next call makes that stage again
        print("\ninterrupted; the same command continues after the last finished stage")
        return 130
