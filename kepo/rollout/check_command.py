"""Read all of a dataset before a run does, and list what is wrong with it.

    kepo data check PATH --task TASK      # and try the task on it
    kepo data check PATH --model MODEL    # and find what the model refuses

The exit code is 1 if something is wrong, or if both datasets have an image in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kepo.data.example import Example
from kepo.data.images import Look, digests_in, looks_of
from kepo.data.load import DataReport, layout_of, load_examples
from kepo.data.records import KINDS, counted
from kepo.data.run_data import readable, with_faint
from kepo.data.splits import shared_images
from kepo.disk.files import printable
from kepo.errors import KepoDataError
from kepo.flags import command_line, refuse
from kepo.rollout.encodable import Reader, encoder_at, faults_of, left_out, plain_reader
from kepo.rollout.tried import faults_of_task
from kepo.sections import Count, PicturesConfig, TaskConfig
from kepo.tasks.environment import task_of
from kepo.tasks.task import Task
from kepo.words import at_home

NAMED = 5
"""The number of problems of each kind that are listed without --all."""


@dataclass(frozen=True)
class Checked:
    """A dataset whose records were read and whose images were decoded."""

    examples: list[Example]
    """The examples with which nothing is wrong."""
    report: DataReport
    looks: dict[Path, Look | KepoDataError]
    """A look at each image, or the error that says why it could not be decoded."""


Asked = tuple[Task, Reader | None]
"""A task, and a model that is asked its questions, if one is."""


def check_data(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    asked: Asked | None = None,
    progress: bool = False,
) -> Checked:
    """Read every record and decode every image. Raises KepoDataError if none of them is right.

    asked: also find what the task is unfit for, and what the model cannot be asked.
    """
    examples, report = load_examples(path, image_root=image_root, progress=progress)
    looks = looks_of((path for e in examples for path in e.images), progress=progress)
    examples, report = readable(examples, report, digests_in(looks))
    if asked is not None:
        task, reader = asked
        faults = faults_of_task(examples, task, progress=progress)
        if reader is not None:
            fit = [example for example in examples if example.id not in faults]
            faults |= faults_of(fit, task, [reader], progress=progress)
        examples, report = left_out(examples, report, faults)
    return Checked(examples, with_faint(report, examples, looks), looks)


def asked_of(settings: Check) -> Asked | None:
    """Return the task and the model that the flags name; None if they name neither."""
    if not (settings.task or settings.prompt_template or settings.model):
        return None
    task = task_of(replace(settings, task=settings.task or TaskConfig.task))
    if settings.model is None:
        return task, None
    encoder = encoder_at(settings.model, settings)
    return task, plain_reader(encoder, task, settings.max_completion_length)


def table(examples: Sequence[Example]) -> list[str]:
    """Return lines of a table that counts the questions: a row for each modality, a column for
    each question type, and sums."""
    counts = Counter((e.modality, e.question_type) for e in examples)
    modalities = sorted({modality for modality, _ in counts})
    types = sorted({kind for _, kind in counts})
    cells = [["", *types, "all"]]
    for modality in modalities:
        row = [counts[modality, kind] for kind in types]
        cells.append([modality, *map(str, row), str(sum(row))])
    sums = [sum(counts[modality, kind] for modality in modalities) for kind in types]
    cells.append(["all", *map(str, sums), str(sum(sums))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def describe(checked: Checked, every: bool) -> list[str]:
    """Return lines that say what a dataset holds and what is wrong with it.

    every: list all problems, not only the first NAMED of each kind.
    """
    report = checked.report
    images = {path for e in checked.examples for path in e.images}
    digests = digests_in(checked.looks)
    contents = {digests[path] for path in images}
    lines = [
        f"{printable(report.path)} ({report.layout}): {report.records} records, "
        f"{report.questions} good questions about {len(images)} images, {len(contents)} of them "
        "different",
        "",
        *table(checked.examples),
    ]
    if report.quirks:
        lines += ["", "odd, or unlike the published schema, but understood:"]
        lines += [f"  {count:6}  {name}" for name, count in sorted(report.quirks.items())]
    lines += _faint_pictures(checked, every)
    if not report.problems:
        return [*lines, "", "nothing is wrong"]
    lines += ["", f"wrong: {counted(report.counts()).replace('bad ', '')}"]
    for kind in KINDS:
        found = [problem for problem in report.problems if problem.kind == kind]
        shown = found if every else found[:NAMED]
        if found:
            lines.append(f"  {len(found):6}  {kind}")
        lines += [f"          {problem}" for problem in shown]
        if len(shown) < len(found):
            lines.append(f"          and {len(found) - len(shown)} more: --all lists them")
    return lines


def _faint_pictures(checked: Checked, every: bool) -> list[str]:
    shown = dict.fromkeys(path for e in checked.examples for path in e.images)
    looks = {path: checked.looks[path] for path in shown}
    faint = {path: look.faint for path, look in looks.items() if isinstance(look, Look)}
    lines = []
    for kind in sorted(set(faint.values()) - {""}):
        found = [path for path in faint if faint[path] == kind]
        named = found if every else found[:NAMED]
        lines += ["", f"pictures that come out {kind}: {len(found)}"]
        lines += [f"          {printable(path)}" for path in named]
        if len(named) < len(found):
            lines.append(f"          and {len(found) - len(named)} more: --all lists them")
    return lines


def compare(checked: Checked, other: Checked) -> tuple[int, list[str]]:
    """Return ``(number of images that both datasets hold by content, lines that say so)``.

    The lines also count images that both hold by path, as parts of one folder may.
    """
    by_path, _ = shared_images(checked.examples, other.examples)
    digests = digests_in(checked.looks | other.looks)
    images, questions = shared_images(checked.examples, other.examples, digests)
    path, total = other.report.path, len(other.examples)
    lines = ["", f"against {printable(path)}: {total} good questions"]
    if other.report.problems:
        lines.append(f"  {len(other.report.problems)} records of it are wrong; check it by itself")
    lines.append(
        f"  {images} images are in both by content, {by_path} by path; {questions} of its "
        "questions are about them"
    )
    return images, lines


@dataclass(frozen=True, kw_only=True)
class Check(TaskConfig, PicturesConfig):
    """What is checked, and how much of it is listed."""

    path: str
    """JSON Lines, JSON lists, Parquet, what datasets.save_to_disk wrote, a name on the Hub,
    OmniMedVQA's layout or Med-R1's split files: a file or a folder."""
    task: str = ""
    """Try this task on every record: multiple_choice, open_answer, or a class of your own, as
    file.py:Class or package.module:Class. Empty checks the records alone, or with model or
    prompt_template as questions with options."""
    model: str | None = None
    """Folder or Hub name of a model that will be asked: find the records that its tokenizer, image
    processor or length of context refuse. None checks the records alone."""
    max_completion_length: Count = 128
    """Tokens of an answer that must fit behind a question."""
    against: str | None = None
    """Count the images that this dataset has too. None disables it."""
    image_root: str | None = None
    """Folder that image paths are relative to. None means the dataset's folder, or its file's; for
    Med-R1's files, the nearest parent folder that contains Images."""
    all: bool = False
    """List all that is wrong, not only the first few of each kind."""


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo data check``; return 1 if something is wrong or both datasets share an image, else
    0."""
    usage = "PATH [OPTIONS]"
    if arguments[:1] != ["check"]:
        if {"-h", "--help"} & {*arguments}:
            arguments = ["check", "--help"]
        else:
            named = repr(arguments[0]) if arguments else "nothing"
            refuse(f"kepo data has {named}; expected kepo data check {usage}")
    [given] = command_line(
        Check,
        prog="kepo data check",
        usage=usage,
        args=arguments[1:],
        description=__doc__,
    )
    given = at_home(given, "path", "against", "image_root", "model")
    for path in filter(None, (given.path, given.against)):  # before hours of reading
        layout_of(path)
    asked = asked_of(given)
    checked = check_data(given.path, image_root=given.image_root, asked=asked, progress=True)
    print("\n".join(describe(checked, given.all)))
    wrong = len(checked.report.problems)
    if given.against is not None:
        other = check_data(given.against, image_root=given.image_root, progress=True)
        shared, lines = compare(checked, other)
        print("\n".join(lines))
        wrong += shared
    return 1 if wrong else 0
