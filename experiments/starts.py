"""What runs start from: questions, a teacher, and a warmed-up student per seed; made when missing.

root/data                    questions of three splits
root/teachers/<digest>       one per setting of teachers
root/students/<digest>       one per warm-up and seed
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.plan import SPLITS
from experiments.pool import quiet
from experiments.results import Row, as_csv, read_rows
from experiments.settings import SETTINGS, Setting
from kepo.data.load import load_omnimedvqa
from kepo.digits.dataset import LARGE_DIGITS, write_digits
from kepo.digits.demo import COMPLETION_TOKENS, SOURCE
from kepo.digits.tiny import build_tiny
from kepo.disk.durable import as_json, make_folder, write_durably
from kepo.errors import KepoConfigError
from kepo.evaluation.answers import greedy_scores
from kepo.miniature.stages import cached
from kepo.miniature.warm_up import train_supervised
from kepo.run.milestones import as_digits
from kepo.tasks.multiple_choice import MultipleChoice

SUPERVISED: Mapping[str, Any] = {"lr": 1e-3, "batch_size": 32}
TEACHER_SEED = 0


@dataclass(frozen=True)
class Questions:
    """How many questions there are, per rendering, and their seed."""

    train: int
    validation: int
    test: int
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        return {"questions": dataclasses.asdict(self)}


def digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def sha256(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


# ---- what decides them ----


def teacher_facts(setting: Setting, questions: Questions) -> dict[str, Any]:
    return {
        **questions.facts,
        **SUPERVISED,
        "steps": setting.teacher_steps,
        "hint_fraction": setting.teacher_hint_fraction,
        "hint_style": setting.hint_style,
        "seed": TEACHER_SEED,
    }


def student_facts(setting: Setting, questions: Questions, seed: int) -> dict[str, Any]:
    types = setting.warmup_question_types
    return {
        **questions.facts,
        **SUPERVISED,
        "steps": setting.warmup_steps,
        "question_types": None if types is None else list(types),
        "hint_fraction": setting.warmup_hint_fraction,
        "hint_style": setting.hint_style,
        "seed": seed,
    }


def teacher_of(root: Path, setting: Setting, questions: Questions) -> Path:
    return root / "teachers" / digest(teacher_facts(setting, questions))


def student_of(root: Path, setting: Setting, questions: Questions, seed: int) -> Path:
    return root / "students" / digest(student_facts(setting, questions, seed))


# ---- making them; each in a process of its own ----


def make_data(root: Path, questions: Questions) -> Path:
    def make(folder: Path) -> None:
        counts = dict(train=questions.train, test=questions.test, validation=questions.validation)
        write_digits(folder, **counts, seed=questions.seed)

    return cached(root / "data", questions.facts, make)


def large_digits(data: Path) -> dict[str, str]:
    """Return by rendering, for each question in order, 1 if a digit is above 5, else 0."""
    found: dict[str, str] = {}
    for example in load_omnimedvqa(data):
        large = str(int(example.question_type == LARGE_DIGITS))
        found[example.modality] = found.get(example.modality, "") + large
    return found


def make_teacher(root: Path, data: Path, name: str, questions: Questions) -> None:
    """Make the teacher of a setting, and write down which questions it answers rightly."""
    setting = SETTINGS[name]
    target, facts = teacher_of(root, setting, questions), teacher_facts(setting, questions)

    def make(folder: Path) -> None:
        _supervise(folder, "teacher", facts, load_omnimedvqa(data / "train"))

    with quiet(target.with_suffix(".log")):
        cached(target, facts, make)
        _ask(target, data)


def make_student(root: Path, data: Path, name: str, seed: int, questions: Questions) -> None:
    setting = SETTINGS[name]
    target = student_of(root, setting, questions, seed)
    facts = student_facts(setting, questions, seed)

    def make(folder: Path) -> None:
        every = load_omnimedvqa(data / "train", modalities=(SOURCE,))
        types = setting.warmup_question_types
        shown = [e for e in every if types is None or e.question_type in types]
        _supervise(folder, "student", facts, shown, hint_examples=every)

    with quiet(target.with_suffix(".log")):
        cached(target, facts, make)
        _ask(target, data)


def answers_file(model: Path) -> Path:
    """Return the file that says, by split and rendering, which questions a model answers
    rightly."""
    return model.with_name(f"{model.name}-answers.json")


def answers_of(model: Path) -> dict[str, dict[str, str]]:
    return json.loads(answers_file(model).read_text(encoding="utf-8"))


def _ask(model: Path, data: Path) -> None:
    from kepo.models.vlm import VLM

    if answers_file(model).exists():
        return
    vlm, task = VLM.load(model), MultipleChoice()
    right = {
        split: as_digits(
            greedy_scores(vlm, load_omnimedvqa(data / split), task, max_tokens=COMPLETION_TOKENS)
        )
        for split in SPLITS
    }
    write_durably(answers_file(model), as_json(right))


def _supervise(folder: Path, size: Any, facts: Mapping[str, Any], shown: Any, **more: Any) -> None:
    from kepo.models.vlm import VLM

    build_tiny(folder, size=size, seed=facts["seed"])
    vlm = VLM.load(folder)
    names = ("steps", "batch_size", "lr", "seed", "hint_fraction", "hint_style")
    train_supervised(vlm, shown, **{name: facts[name] for name in names}, **more, progress=False)
    vlm.save(folder)


# ---- what is told of them beside the results ----

QUESTIONS = ("split", "modality", "large")
TEACHERS = ("teacher", "teacher_steps", "hint_style", "split", "modality", "accuracy", "items")


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    """Return how many questions are right in one of two answers by rendering, and wrong in the
    other."""
    return sum(x != y for name in one for x, y in zip(one[name], other[name], strict=True))


def write_facts(out: Path, data: Path, teachers: Mapping[Path, Setting]) -> None:
    """Write questions.csv, in which 1 is a question with a digit above 5, and add to teachers.csv
    which questions each teacher answers rightly.

    Raises KepoConfigError if questions.csv is of other questions than these, or teachers.csv has a
    teacher of these settings that answers otherwise.
    """
    make_folder(out)
    large = {split: large_digits(data / split) for split in SPLITS}
    rows = [
        {"split": split, "modality": modality, "large": digits}
        for split, by in large.items()
        for modality, digits in by.items()
    ]
    path, text = out / "questions.csv", as_csv(QUESTIONS, rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise KepoConfigError(
            f"out={str(out)!r} holds results on other questions; take another out"
        )
    write_durably(path, text)
    path = out / "teachers.csv"
    known = read_rows(path, TEACHERS)
    for folder, setting in teachers.items():
        known += _facts_of_teacher(path, known, folder, setting)
    write_durably(path, as_csv(TEACHERS, known))


def _facts_of_teacher(path: Path, known: list[Row], folder: Path, setting: Setting) -> list[Row]:
    about = {"teacher_steps": str(setting.teacher_steps), "hint_style": setting.hint_style}
    before: dict[str, dict[str, str]] = {}
    for row in known:
        if about.items() <= row.items():
            before.setdefault(row["split"], {})[row["modality"]] = row["items"]
    answers = answers_of(folder)
    if not before:
        return [
            {"teacher": sha256(folder), **about, "split": split, "modality": modality}
            | {"accuracy": f"{items.count('1') / len(items):.5g}", "items": items}
            for split, by in answers.items()
            for modality, items in by.items()
        ]
    if different := sum(differences(answers[split], before[split]) for split in SPLITS):
        raise KepoConfigError(
            f"out has runs with the teacher of {path}, which answers {different} questions "
            f"otherwise than the one made here in {folder}; take another out"
        )
    return []
