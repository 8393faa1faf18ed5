"""Count the questions that a saved model answers correctly.

It answers a dataset of any layout greedily; the table is by modality and type of question. `chance`
is what blind guessing would score on the same questions: with four options each it would be 0.25,
but many have two or three. An answer is unparsed where it holds no single well-formed <answer>; it
counts as wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kepo.data.example import Example
from kepo.data.images import digests_of
from kepo.data.load import DataReport, layout_of, load_examples
from kepo.data.run_data import as_record, capped, readable
from kepo.disk.durable import as_json, write_durably
from kepo.errors import KepoConfigError, KepoDataError
from kepo.evaluation.greedy import greedy_answers
from kepo.evaluation.statistics import wilson
from kepo.flags import command_line
from kepo.models.device import known_device
from kepo.models.reading import encoder_of, read_config
from kepo.models.vlm import VLM
from kepo.rollout.encodable import Faults, Reader, faults_of, left_out, plain_reader
from kepo.sections import TaskConfig
from kepo.tasks.environment import task_of
from kepo.tasks.task import Task
from kepo.words import at_home


@dataclass(frozen=True)
class Evaluation(TaskConfig):
    """Settings of an evaluation."""

    model: str
    """Folder or Hub name of a vision-language model; of a run, its checkpoint's policy/."""
    data: str
    """Folder in OmniMedVQA's layout, Med-R1's split files, or what datasets.save_to_disk wrote."""
    modalities: tuple[str, ...] | None = None
    """Ask about these modalities only. None means all."""
    question_types: tuple[str, ...] | None = None
    """Ask these types of question only. None means all."""
    limit: int | None = None
    """Ask the first so many questions of each modality. None means all."""
    image_root: str | None = None
    """Folder that image paths are relative to. None means the dataset's folder; for Med-R1's files,
    the nearest parent folder that contains Images."""
    batch: int = 64
    """Questions answered at once."""
    max_completion_length: int = 128
    """Tokens per answer, at most."""
    dtype: str = "float32"
    """The dtype in which the model computes: float32, bfloat16 or float16."""
    device: str = "auto"
    """The device that the model is on: cpu, cuda, cuda:<number>, or auto, which is cuda where there
    is a GPU, else cpu."""
    json: str | None = None
    """Write settings, counts and all numbers of the table into this file. None disables it."""


PATHS = ("model", "data", "image_root", "json")


class Answer(NamedTuple):
    """The answer to one question, and whether it is right."""

    modality: str
    question_type: str
    right: bool
    parsed: bool
    chance: float
    """The chance of guessing it: of several options, one over their number."""


def evaluation(settings: Evaluation) -> dict[str, Any]:
    """Ask the model; return plain values: settings, data, overall, macro_mean, cells, sums.

    A cell is the questions of one modality and type. Raises KepoConfigError, KepoDataError or
    KepoCheckpointError where settings, data or model are not usable.
    """
    settings = at_home(settings, *PATHS)
    for name in ("limit", "batch", "max_completion_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise KepoConfigError(f"{name}={value}; expected a number >= 1")
    dtypes = ("float32", "bfloat16", "float16")
    if settings.dtype not in dtypes:
        raise KepoConfigError(f"dtype={settings.dtype!r}; expected one of {', '.join(dtypes)}")
    known_device(settings.device)
    layout_of(settings.data)  # before a model is looked for, perhaps on the Hub
    task = task_of(settings)
    examples, report = questions(settings, task, reader_of(settings, task))
    vlm = VLM.load(settings.model, dtype=settings.dtype, device=settings.device)
    texts = greedy_answers(
        vlm,
        examples,
        task,
        max_tokens=settings.max_completion_length,
        batch_size=settings.batch,
        progress=True,
    )
    answers = [judged(task, *pair) for pair in zip(examples, texts, strict=True)]
    return {
        "settings": dataclasses.asdict(settings),
        "data": as_record(report),
        **tabulated(answers),
    }


def reader_of(settings: Evaluation, task: Task) -> Reader:
    """Return the model as a reader that is asked; only its config and encoder are read."""
    encoder = encoder_of(settings.model, read_config(settings.model))
    return plain_reader(encoder, task, settings.max_completion_length)


def questions(
    settings: Evaluation, task: Task, reader: Reader | None = None
) -> tuple[list[Example], DataReport]:
    """Return the questions to ask, every image decoded once, and a report with the others' faults.

    reader: the model they are asked of; questions that it cannot be asked are left out. None means
    any model.
    """
    examples, report = load_examples(
        settings.data,
        modalities=settings.modalities,
        question_types=settings.question_types,
        image_root=settings.image_root,
        progress=True,
    )
    # With a limit only as many images are decoded as it takes to find so many good ones.
    digests: dict[Path, str | KepoDataError] = {}
    faults: Faults = {}
    judged: set[str] = set()

    def unusable(example: Example) -> bool:
        broken = (isinstance(digests.get(path), KepoDataError) for path in example.images)
        return example.id in faults or any(broken)

    while True:
        chosen = capped([e for e in examples if not unusable(e)], settings.limit)
        unseen = [path for e in chosen for path in e.images if path not in digests]
        unjudged = [e for e in chosen if e.id not in judged]
        if unseen:
            digests |= digests_of(unseen, progress=True)
        elif unjudged and reader is not None:
            faults |= faults_of(unjudged, task, [reader], progress=True)
            judged |= {e.id for e in unjudged}
        else:
            break
    seen = [e for e in examples if all(path in digests for path in e.images)]
    good, report = readable(seen, report, digests)
    good, report = left_out(good, report, faults)
    chosen = capped(good, settings.limit)
    return chosen, dataclasses.replace(report, questions=len(chosen))


def judged(task: Task, example: Example, text: str) -> Answer:
    return Answer(
        example.modality,
        example.question_type,
        right=task.is_right(text, example),
        parsed=task.answer_of(text) is not None,
        chance=task.chance(example),
    )


def tabulated(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the accuracy of every cell (a modality and a type of question), of every modality, of
    every type, and of all questions; and the mean over modalities."""

    def by(key: Callable[[Answer], Any]) -> dict[Any, dict[str, Any]]:
        parts: dict[Any, list[Answer]] = {}
        for answer in answers:
            parts.setdefault(key(answer), []).append(answer)
        return {name: summed(parts[name]) for name in sorted(parts)}

    modalities = by(lambda answer: answer.modality)
    cells = by(lambda answer: (answer.modality, answer.question_type))
    return {
        "overall": summed(answers),
        "macro_mean": {
            name: sum(part[name] for part in modalities.values()) / len(modalities)
            for name in ("accuracy", "chance")
        },
        "modalities": modalities,
        "question_types": by(lambda answer: answer.question_type),
        "cells": [{"modality": m, "question_type": t, **cell} for (m, t), cell in cells.items()],
    }


def summed(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return counts of questions, their accuracy with its 95 % interval, and the chance level."""
    right, count = sum(answer.right for answer in answers), len(answers)
    share, low, high = wilson(right, count)
    return {
        "questions": count,
        "right": right,
        "unparsed": sum(not answer.parsed for answer in answers),
        "accuracy": share,
        "low": low,
        "high": high,
        "chance": sum(answer.chance for answer in answers) / count,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return the table: under each modality its types of question, then all modalities by type."""
    blocks = []
    for modality, whole in result["modalities"].items():
        cells = [cell for cell in result["cells"] if cell["modality"] == modality]
        blocks.append([(modality, "all", whole)])
        if len(cells) > 1 or len(result["question_types"]) > 1:
            blocks[-1] += [("", cell["question_type"], cell) for cell in cells]
    if len(blocks) > 1:
        types = result["question_types"]
        blocks.append([("all", "all", result["overall"])])
        if len(types) > 1:
            blocks[-1] += [("", name, part) for name, part in types.items()]
    names = [name for block in blocks for name, _, _ in block]
    kinds = [kind for block in blocks for _, kind, _ in block]
    first = max(map(len, [*names, "modality"]))
    second = max(map(len, [*kinds, "question type"]))
    found = [
        f"{'modality':{first}}  {'question type':{second}}  questions  accuracy         95 %  "
        "chance  unparsed"
    ]
    for block in blocks:
        found.append("")
        found += [
            f"{name:{first}}  {kind:{second}}  {part['questions']:9}  {part['accuracy']:8.3f}  "
            f"{part['low']:.3f}-{part['high']:.3f}  {part['chance']:6.3f}  {part['unparsed']:8}"
            for name, kind, part in block
        ]
    macro = result["macro_mean"]
    found.append("")
    found.append(
        f"mean over modalities, each counting the same: {macro['accuracy']:.3f}, chance "
        f"{macro['chance']:.3f}"
    )
    return found


def main(arguments: Sequence[str]) -> None:
    """Run ``kepo evaluate``."""
    from kepo.models.reading import hide_transformers_bars

    [settings] = command_line(
        Evaluation,
        prog="kepo evaluate",
        usage="MODEL DATA [OPTIONS]",
        args=arguments,
        description=__doc__,
    )
    hide_transformers_bars()
    settings = at_home(settings, *PATHS)
    if settings.json is not None:  # known now, not after an hour of answers
        folder = Path(settings.json).resolve().parent
        if not folder.is_dir():
            raise KepoConfigError(f"json={settings.json!r}: its folder is not there; make it first")
        if Path(settings.json).is_dir() or not os.access(folder, os.W_OK):
            raise KepoConfigError(f"json={settings.json!r} cannot be written; choose another file")
    result = evaluation(settings)
    left_out = sum(result["data"]["bad_records"].values())
    if left_out:
        kinds = (f"{kind} {count}" for kind, count in result["data"]["bad_records"].items())
        print(f"left out: {left_out} bad records ({', '.join(kinds)})")
    print("\n".join(lines(result)))
    if settings.json is not None:
        text = as_json(result, indent=1, ensure_ascii=False)
        write_durably(Path(settings.json), text + "\n")
