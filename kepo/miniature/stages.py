"""The stages of a demonstration, each made once and kept, and the table at its end.

data -> teacher -> student's warm-up -> KEPO -> table and curves
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kepo.check import check_settings
from kepo.config import Config
from kepo.data.load import Example, load_omnimedvqa
from kepo.disk.durable import as_json, write_durably
from kepo.disk.files import read_own, refuse_irregular
from kepo.distributed.processes import launched
from kepo.errors import KepoConfigError
from kepo.evaluation.answers import greedy_scores
from kepo.loop import train
from kepo.miniature.tiny_models import Size
from kepo.miniature.warm_up import TASK, train_supervised
from kepo.models.reading import hide_transformers_bars
from kepo.models.vlm import VLM
from kepo.run.lock import WRITTEN
from kepo.run.manifest import new_folder, verify, write_manifest
from kepo.run.metrics import read_metrics


class Supervision(Protocol):
    """The settings of supervised training; `kepo.digits.demo.Demo` says what each is."""

    @property
    def supervised_batch(self) -> int: ...
    @property
    def supervised_lr(self) -> float: ...
    @property
    def hint_fraction(self) -> float: ...
    @property
    def seed(self) -> int: ...


class Stages(Supervision, Protocol):
    """The settings that every demonstration has."""

    @property
    def root(self) -> str: ...
    @property
    def train_questions(self) -> int: ...
    @property
    def test_questions(self) -> int: ...
    @property
    def teacher_steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...


MAKES_MODELS = ("supervised_batch", "supervised_lr", "hint_fraction", "train_questions")
"""The settings that decide a warmed-up model, beside its number of steps."""


@dataclass(frozen=True)
class Made:
    """What the stages before KEPO left behind."""

    data: Path
    """Folder of data: train, and what is asked in evaluations."""
    teacher: Path
    student: Path


@dataclass(frozen=True)
class Miniature:
    """What tells one demonstration from another."""

    source: str
    """The only modality that the student is trained on."""
    data_settings: tuple[str, ...]
    """The settings that decide the data."""
    make_data: Callable[[Path], None]
    build: Callable[[Path, Path, Size], None]
    """Writes a random model, given its folder, that of the data, and its size."""
    config: Callable[[Made, float | None], Config]
    """Returns the settings of the run, given a learning rate or None for the demonstration's."""
    report: Callable[[Made], None]
    """Prints what came out."""


def run_stages(demo: Stages, miniature: Miniature) -> int:
    """Run all stages; return the exit code of the training."""
    hide_transformers_bars()
    if launched() > 1:
        raise KepoConfigError("kepo demo: it runs in one process; start it without torchrun")
    refuse(demo, miniature)
    root = Path(demo.root)
    started = time.perf_counter()

    def stage(name: str, settings: tuple[str, ...], make: Callable[[Path], None]) -> Path:
        made_with = {key: getattr(demo, key) for key in (*settings, "seed")}
        return cached(root / name, made_with, make)

    def model(size: Size, steps: str, modalities: tuple[str, ...] | None) -> Path:
        def make(folder: Path) -> None:
            miniature.build(folder, data, size)
            examples = load_omnimedvqa(data / "train", modalities=modalities)
            supervise(folder, examples, getattr(demo, steps), demo, size)

        return stage(size, (steps, *MAKES_MODELS), make)

    data = stage("data", miniature.data_settings, miniature.make_data)
    teacher = model("teacher", "teacher_steps", None)
    made = Made(data, teacher, model("student", "warmup_steps", (miniature.source,)))
    print(f"KEPO: training on {miniature.source!r} only", flush=True)
    code = train(miniature.config(made, None)).exit_code
    if code == 0:
        miniature.report(made)
        print(f"whole demonstration: {time.perf_counter() - started:.0f} s in this call")
    return code


def refuse(demo: Stages, miniature: Miniature) -> None:
    """Raise KepoConfigError for any stage's setting that is out of range, and OSError if something
    is in the way of the run's files. This comes before the first stage, which takes minutes."""
    least = dict(train_questions=1, test_questions=1, teacher_steps=1, warmup_steps=1)
    for name, value in (least | dict(supervised_batch=1, seed=0)).items():
        if getattr(demo, name) < value:
            raise KepoConfigError(f"{name}={getattr(demo, name)}; expected a number >= {value}")
    if not 0 <= demo.hint_fraction <= 1:
        raise KepoConfigError(f"hint_fraction={demo.hint_fraction}; expected a number in [0, 1]")
    here = Path("not made yet")
    for lr in (demo.supervised_lr, None):
        check_settings(miniature.config(Made(here, here, here), lr))
    refuse_irregular(Path(demo.root), ("accuracy.json", *WRITTEN))


def supervise(
    folder: Path, examples: Sequence[Example], steps: int, demo: Supervision, desc: str
) -> None:
    """Train the model in a folder on worked answers, and save it there."""
    vlm = VLM.load(folder)
    train_supervised(
        vlm,
        examples,
        steps=steps,
        batch_size=demo.supervised_batch,
        lr=demo.supervised_lr,
        seed=demo.seed,
        hint_fraction=demo.hint_fraction,
        desc=desc,
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


Column = dict[str, float]
"""Accuracies by name."""


def columns(
    root: Path,
    teacher: Path,
    examples: Sequence[Example],
    max_tokens: int,
    accuracies: Callable[[dict[str, list[float]]], Column],
) -> list[Column]:
    """Return the accuracies of the student before and after KEPO and of the teacher, and write them
    to accuracy.json, out of which the teacher's are taken if they are there.

    accuracies: makes them of what was right, by modality 1 or 0 for each question in order.
    """
    records = [record for record in read_metrics(root / "metrics.jsonl") if "eval" in record]
    before, after = (
        accuracies({name: [float(x) for x in digits] for name, digits in found.items()})
        for found in (records[place]["eval_items"] for place in (0, -1))
    )
    table = root / "accuracy.json"
    of_teacher = known_teacher(table, after)
    if of_teacher is None:
        scores = greedy_scores(VLM.load(teacher), examples, TASK, max_tokens=max_tokens)
        of_teacher = accuracies(scores)
    found = {"before": before, "after": after, "teacher": of_teacher}
    write_durably(table, as_json(found, indent=1))
    return [before, after, of_teacher]


def known_teacher(table: Path, after: Column) -> Column | None:
    """Return the teacher's accuracies from an earlier call's table; None unless the table is whole
    and of this run."""
    try:
        known = json.loads(read_own(table).decode("utf-8"))
        if known["after"] == after and known["teacher"].keys() == after.keys():
            return known["teacher"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # the table is made again
    return None


def print_rows(title: str, rows: Sequence[tuple[str, float, float, float]]) -> None:
    """Print rows of a name and the accuracies before, after and of the teacher."""
    print(f"\n{title:34} {'before':>7} {'after':>7} {'gain':>7} {'teacher':>8}")
    for name, old, new, best in rows:
        print(f"{name:34} {old:7.3f} {new:7.3f} {new - old:+7.3f} {best:8.3f}")


def outputs(root: Path) -> str:
    """Return words that name the files in which a demonstration's results are."""
    names = {"curves": "curves.png", "metrics": "metrics.jsonl", "table": "accuracy.json"}
    return "   ".join(f"{what}: {root / name}" for what, name in names.items())


def interruptible(run: Callable[[], int]) -> int:
    """Run a demonstration; say how to go on if it is interrupted before its training, which ends by
    itself in good order."""
    try:
        return run()
    except KeyboardInterrupt:  # the next call makes that stage again
        print("\ninterrupted; the same command continues after the last finished stage")
        return 130
