"""Load the questions of a run's training and evaluation, and record what was left out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kepo.data.example import Example
from kepo.data.identity import records_identity
from kepo.data.images import Look, digests_in, looks_of
from kepo.data.layouts import from_python
from kepo.data.load import DataReport, load_examples
from kepo.data.records import RecordProblem
from kepo.data.splits import shared_images, split_by_image, without_images_of
from kepo.disk.durable import as_json, write_durably
from kepo.disk.files import printable, read_own
from kepo.errors import KepoConfigError, KepoDataError
from kepo.sections import DataConfig

Judge = Callable[[Sequence[Example], DataReport, bool], tuple[list[Example], DataReport]]
"""A function that leaves out examples that the models cannot be asked; the flag is true for
training examples."""
NAMED = 20
"""The number of problems that a run's record names; it counts all of them."""


@dataclass(frozen=True)
class RunData:
    """The questions of a run, and the record of what was loaded."""

    train: list[Example]
    eval: list[Example]
    """The evaluation questions; empty without eval_data and eval_share."""
    record: dict[str, Any]
    """Counts of everything, for the run folder's data.json."""
    summary: str
    """The record in a few lines of text."""
    identity: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Digests of the questions, by ``train_data`` and ``eval_data``."""

    @property
    def by_setting(self) -> dict[str, list[Example]]:
        """Return the questions by setting, under the same names as in ``identity``."""
        return {"train_data": self.train, "eval_data": self.eval}


C = TypeVar("C", bound=DataConfig)


def with_own_data(config: C, data: Iterable[Any] | None) -> tuple[C, list[Any] | None]:
    """Return the questions that came as an argument as a list, and a config whose ``train_data``
    says that they did; both as they are if ``data`` is None. Raises KepoConfigError if there is
    ``train_data`` too."""
    if data is None:
        return config, None
    if config.train_data:
        raise KepoConfigError(
            f"data is given, and so is train_data={config.train_data!r}; give one"
        )
    return replace(config, train_data=from_python.NAME), from_python.listed(data)


def load_data(
    config: DataConfig, judge: Judge | None = None, own: Sequence[Any] | None = None
) -> RunData:
    """Load ``train_data`` and ``eval_data`` as the config selects them, without bad records.

    With ``verify_images`` every image is decoded once: one that cannot be decoded makes its record
    bad, and the images of training and evaluation are compared by content, otherwise by path.
    Images in both are counted, not removed. judge: leaves out what the run's models cannot be asked
    (kepo.rollout.encodable); None = nothing is left out. own: the questions in the place of
    ``train_data``, if they came as an argument. Raises KepoDataError if nothing is left to
    train on or to evaluate.
    """
    source = config.train_data if own is None else own
    train, train_report = load_examples(
        source,
        modalities=config.train_modalities,
        question_types=config.train_question_types,
        image_root=config.image_root,
        bad_records=config.bad_records,
    )
    held_out: list[Example] = []
    eval_report = None
    eval_path = source if config.eval_share else config.eval_data
    if eval_path is not None:
        held_out, eval_report = load_examples(
            eval_path, image_root=config.image_root, bad_records=config.bad_records
        )
        if not config.eval_share:
            held_out = capped(held_out, config.eval_limit)
    digests = None
    if config.verify_images:
        shown = (path for e in [*train, *held_out] for path in e.images)
        looks = looks_of(shown, progress=True)
        digests = digests_in(looks)
        train, train_report = readable(train, train_report, digests, config.bad_records)
        train_report = with_faint(train_report, train, looks)
        if eval_report is not None:
            held_out, eval_report = readable(held_out, eval_report, digests, config.bad_records)
            eval_report = with_faint(eval_report, held_out, looks)
    if judge is not None:
        train, train_report = judge(train, train_report, True)
        if eval_report is not None:
            held_out, eval_report = judge(held_out, eval_report, False)
    if config.eval_share:
        # The share is of all questions, not only of those trained on; every seed gets the same
        # images.
        _, held_out = split_by_image(held_out, test_share=config.eval_share, digests=digests)
        train = without_images_of(held_out, train, digests)
        train_report = replace(train_report, questions=len(train))
        held_out = capped(held_out, config.eval_limit)
        if not train:
            raise KepoDataError(
                f"eval_share={config.eval_share} holds out every image that "
                "train_modalities and train_question_types leave; give a smaller share"
            )

    ids = hashlib.sha256("\n".join(example.id for example in train).encode()).hexdigest()
    record: dict[str, Any] = {"train": as_record(train_report) | {"ids_sha256": ids}}
    lines = [f"training on {train_report.summary()}"]
    if eval_report is not None:
        images, questions = shared_images(train, held_out, digests)
        record["eval"] = as_record(replace(eval_report, questions=len(held_out)))
        record["eval"] |= {
            "modalities": asked(held_out, lambda example: example.modality),
            "question_types": asked(held_out, lambda example: example.question_type),
        }
        record["shared"] = {
            "images": images,
            "eval_questions": questions,
            "compared": "paths" if digests is None else "contents",
        }
        lines.append(f"evaluating on {len(held_out)} questions of {eval_report.summary()}")
        if images:
            lines.append(
                f"  {questions} of them are about {images} images that are trained on too: the "
                "evaluation is not of unseen images"
            )
    identity = {"train_data": records_identity(train, digests)}
    if held_out:
        identity["eval_data"] = records_identity(held_out, digests)
    return RunData(train, held_out, record, "\n".join(lines), identity)


def capped(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return the first ``limit`` examples of each modality, in order; None = all."""
    kept: list[Example] = []
    count: dict[str, int] = {}
    for example in examples:
        count[example.modality] = count.get(example.modality, 0) + 1
        if limit is None or count[example.modality] <= limit:
            kept.append(example)
    return kept


def readable(
    examples: Sequence[Example],
    report: DataReport,
    digests: dict[Path, str | KepoDataError],
    bad_records: str = "skip",
) -> tuple[list[Example], DataReport]:
    """Return the examples whose images were decoded, and the report with the others as problems.

    Raises KepoDataError for the first such problem if bad_records is "fail", or if none is left.
    """
    kept = []
    problems = list(report.problems)
    for example in examples:
        found = [digests[path] for path in example.images]
        error = next((one for one in found if not isinstance(one, str)), None)
        if error is None:
            kept.append(example)
        elif bad_records == "fail":
            raise error
        else:
            problems.append(
                RecordProblem("image unreadable", f"question {example.id!r}", str(error))
            )
    report = replace(
        report,
        questions=report.questions - len(examples) + len(kept),
        problems=tuple(problems),
    )
    if not kept:
        raise KepoDataError(f"{report.summary()}; no question is left")
    return kept, report


def with_faint(
    report: DataReport, examples: Sequence[Example], looks: Mapping[Path, Look | KepoDataError]
) -> DataReport:
    """Return the report with the questions that show a nearly black or flat picture among its
    quirks."""
    quirks = Counter(report.quirks)
    for example in examples:
        seen = (looks[path] for path in example.images)
        quirks.update(
            {f"picture {one.faint}" for one in seen if isinstance(one, Look) and one.faint}
        )
    return replace(report, quirks=dict(quirks))


def as_record(report: DataReport) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "path": printable(report.path),
        "layout": report.layout,
        "records": report.records,
        "questions": report.questions,
        "bad_records": report.counts(),
        "first_problems": [str(problem) for problem in report.problems[:NAMED]],
        "quirks": report.quirks,
    }


def asked(
    examples: Sequence[Example], key: Callable[[Example], str]
) -> dict[str, dict[str, float | None]]:
    """Return the number of questions by ``key``, and the chance of guessing one: the mean of one
    over the number of options, None where a question has no options."""
    parts: dict[str, list[Example]] = {}
    for example in examples:
        parts.setdefault(key(example), []).append(example)
    return {
        name: {
            "questions": len(part),
            "chance": sum(1 / len(example.options) for example in part) / len(part)
            if all(example.options for example in part)
            else None,
        }
        for name, part in parts.items()
    }


def write_record(data: RunData, run_dir: Path, *, resuming: bool) -> None:
    """Write ``data.json`` in the run folder.

    A resumed run must find the questions it began with: raises KepoDataError if the training
    questions differ from the file's, say because a disk is missing. A file that is damaged, or
    empty after a power loss, is reported and written anew.
    """
    file = run_dir / "data.json"
    if resuming and file.exists():
        now = data.record["train"]
        try:
            before = json.loads(read_own(file).decode("utf-8"))["train"]
            ids, count = before["ids_sha256"], before["questions"]
        except (ValueError, KeyError, TypeError, RecursionError):
            print(f"{file} is damaged and written anew; what it said of the questions is not known")
        else:
            if ids != now["ids_sha256"]:
                raise KepoDataError(
                    f"train_data has {now['questions']} good questions, but {run_dir} was begun "
                    f"with {count} or with others; bring them back, use another run_dir, or, if it "
                    f"is {file.name} that is wrong, remove it.\n{data.summary}"
                )
    write_durably(file, as_json(data.record, indent=1, ensure_ascii=False) + "\n")
