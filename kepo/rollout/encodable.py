"""Records that only a model's encoder can judge: found before the first step, left out by id.

These are a text with control tokens in it, which would be read as the end of a turn or as an image;
a picture of a shape that the image processor refuses; a prompt for which, with what is to follow,
the model has too few positions. No picture is decoded: its size is in its header.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from kepo.config import Config
from kepo.data.images import FORMATS
from kepo.data.load import DataReport, Example
from kepo.data.records import RecordProblem
from kepo.data.run_data import Judge
from kepo.errors import KepoDataError
from kepo.models.encoding import Encoder, Prompt
from kepo.models.reading import encoder_of, read_config, resize_pictures
from kepo.rollout.hints import MAX_HINT_LENGTH
from kepo.rollout.prompts import hint_prompt, prompt_of, worked_answer
from kepo.sections import PicturesConfig, TeacherConfig
from kepo.tasks.task import Task, errors_of, refuse_told
from kepo.teachers.first_words import offer_of
from kepo.teachers.several import place_of, teacher_place
from kepo.teachers.transport import Server
from kepo.words import is_address

Faults = dict[str, RecordProblem]
"""The problem of each faulty example, by example id."""
_AT_ONCE = 256
_READERS = 8  # threads; opening a file leaves Python's lock


@dataclass(frozen=True)
class Reader:
    """A model that is asked about examples, and the texts it is asked."""

    name: str
    encoder: Encoder
    prompts: Callable[[Example], Sequence[tuple[Prompt, int]]]
    """A function: example -> what the model reads, and the most tokens that may follow each."""
    completions: Callable[[Example], Sequence[str]] = lambda example: ()
    """A function that returns texts that are trained on as if the model had said them."""
    about: Callable[[Example], bool] = lambda example: True
    """A function that says whether the model is asked about an example at all."""


def judge_of(config: Config, task: Task) -> Judge:
    """Return the judge of a run's records: the task, the student's encoder, and for records that
    are trained on the teacher's. Raises KepoCheckpointError if one cannot be read."""
    limit = config.max_completion_length
    hint = min(MAX_HINT_LENGTH, limit)

    def longest(example: Example, who: str) -> tuple[Prompt, int]:
        if not (config.hints and config.hint_for == who):
            return prompt_of(task, example), limit
        hinted = prompt_of(task, example, "", gives_answer=config.hint_gives_answer)
        return hinted, hint + limit

    def asked(example: Example) -> list[tuple[Prompt, int]]:
        return [longest(example, "student")]

    def asks_teacher(example: Example) -> list[tuple[Prompt, int]]:
        prompts = [longest(example, "teacher")] if config.distils else []
        if config.hints:
            request = hint_prompt(task, example, with_answer=config.hint_with_answer)
            prompts.append((request, hint))
        return prompts

    def given(example: Example) -> list[str]:
        return [worked_answer(task, example)] if config.data_fraction > 0 else []

    student = encoder_at(config.student, config)
    training = [Reader("student", student, asked, given)]
    for place, (which, path) in enumerate(config.taught_by.items()):
        encoder = (
            replace(student, positions=offer_of(Server(which, path, config), config).positions)
            if is_address(path)
            else encoder_at(path, config)
        )
        training.append(Reader(which, encoder, asks_teacher, about=_taught_at(place, config)))

    def judge(
        examples: Sequence[Example], report: DataReport, trained: bool
    ) -> tuple[list[Example], DataReport]:
        readers = training if trained else [plain_reader(student, task, limit)]
        faults = untaught(examples, config) if trained and config.taught_by else {}
        asked = [example for example in examples if example.id not in faults]
        faults |= faults_of(asked, task, readers, progress=True)
        return left_out(examples, report, faults, config.bad_records)

    return judge


def untaught(examples: Sequence[Example], config: TeacherConfig) -> Faults:
    """Return the faults of the examples for which ``teachers`` has no teacher."""
    if not config.teachers:
        return {}
    names, column = ", ".join(value for value, _ in config.teachers), config.teacher_column
    return {
        one.id: problem(
            one, "no teacher", f"its {column} is {one.fields().get(column)!r}; teachers has {names}"
        )
        for one in examples
        if teacher_place(one.fields(), config) is None
    }


def _taught_at(place: int, config: TeacherConfig) -> Callable[[Example], bool]:
    return lambda example: place_of(example, config) == place


def encoder_at(path: str, config: PicturesConfig) -> Encoder:
    """Return a model's encoder, with pictures of the size that the settings say; of its files only
    the config, tokenizer and image processor are read."""
    return resize_pictures(encoder_of(path, read_config(path)), config, path)


def plain_reader(encoder: Encoder, task: Task, limit: int) -> Reader:
    """Return a reader that is asked the plain question and answers in at most ``limit`` tokens."""
    return Reader("model", encoder, lambda example: [(prompt_of(task, example), limit)])


def faults_of(
    examples: Sequence[Example], task: Task, readers: Sequence[Reader], *, progress: bool = False
) -> Faults:
    """Find the examples that are unfit for the task, or that a reader cannot be asked about; return
    the first fault of each. Raises KepoConfigError for a template that shows the answer.

    progress: show a bar.
    """
    refuse_told(task, examples)
    unfit = [(example, _why_unfit(task, example)) for example in examples]
    faults = {e.id: problem(e, "task", f"it {why}") for e, why in unfit if why is not None}
    examples = [example for example in examples if example.id not in faults]
    sizes = _sizes(path for example in examples for path in example.images)
    for reader in readers:
        _refuse_pictures(examples, reader)
    bar = tqdm(
        total=len(examples) * len(readers),
        desc="records",
        unit=" records",
        disable=not progress,
        delay=1,
    )
    with bar:
        for reader in readers:
            for start in range(0, len(examples), _AT_ONCE):
                some = examples[start : start + _AT_ONCE]
                for fault in _faults([*filter(reader.about, some)], reader, sizes):
                    faults.setdefault(fault[0].id, problem(*fault))
                bar.update(len(some))
    return faults


def left_out(
    examples: Sequence[Example], report: DataReport, faults: Faults, bad_records: str = "skip"
) -> tuple[list[Example], DataReport]:
    """Return the examples without a fault, and the report with the others as problems.

    Raises KepoDataError for the first fault if bad_records is "fail", or if none is left.
    """
    found = [faults[example.id] for example in examples if example.id in faults]
    if found and bad_records == "fail":
        raise KepoDataError(f"{report.path}: {found[0]}")
    kept = [example for example in examples if example.id not in faults]
    report = replace(
        report,
        questions=report.questions - len(found),
        problems=(*report.problems, *found),
    )
    if not kept:
        raise KepoDataError(f"{report.summary()}; no question is left")
    return kept, report


Fault = tuple[Example, str, str]  # kind and message


def _faults(
    examples: Sequence[Example], reader: Reader, sizes: dict[Path, tuple[int, int] | str]
) -> list[Fault]:
    faults: list[Fault] = []
    asked: list[tuple[Example, Prompt, int]] = []
    for example in examples:
        prompts = reader.prompts(example)
        fault = _text_fault(
            [*(t for prompt, _ in prompts for t in _texts(prompt)), *reader.completions(example)],
            reader,
        ) or _image_fault(example, reader, sizes)
        if fault:
            faults.append((example, *fault))
            continue
        asked += [(example, prompt, room) for prompt, room in prompts]
    positions = reader.encoder.positions
    if positions is None or not asked:
        return faults
    lengths = reader.encoder.text_lengths([prompt for _, prompt, _ in asked])
    for (example, prompt, room), text in zip(asked, lengths, strict=True):
        images = sum(reader.encoder.image_tokens(*sizes[path]) for path in prompt.images)
        if text + images + room > positions:
            message = (
                f"its prompt has {text} tokens of text and {images} of images, and up to {room} "
                f"may follow; the {reader.name} has {positions} positions "
                "(max_position_embeddings): prompts are not cut, so give smaller images, less "
                "text or a shorter max_completion_length"
            )
            faults.append((example, "prompt too long", message))
    return faults


def _texts(prompt: Prompt) -> list[str]:
    return [*(text for _, text in prompt.earlier), prompt.text]


def _text_fault(texts: Sequence[str], reader: Reader) -> tuple[str, str] | None:
    for text in texts:
        try:
            found = reader.encoder.control_tokens_in(text)
        except KepoDataError as error:
            return "text refused", str(error)
        if found:
            return "text refused", (
                f"its text has the control tokens {', '.join(dict.fromkeys(found))} of the "
                f"{reader.name} in it, which would be read as the end of a turn or as an image; "
                "take them out"
            )
    return None


def _refuse_pictures(examples: Sequence[Example], reader: Reader) -> None:
    """Raise KepoDataError if a reader sees no pictures and is asked about some: what is left of
    such questions without them is nothing that it should learn from."""
    shown = [example for example in examples if example.images and reader.about(example)]
    if shown and reader.encoder.pictures is None:
        raise KepoDataError(
            f"examples: the {reader.name} sees no pictures, and {len(shown)} of {len(examples)} "
            f"questions have some, first {shown[0].id!r}; expected questions without pictures, or "
            "a vision-language model"
        )


def _image_fault(
    example: Example, reader: Reader, sizes: dict[Path, tuple[int, int] | str]
) -> tuple[str, str] | None:
    for path in example.images:
        size = sizes[path]
        if isinstance(size, str):
            return "image unreadable", f"image {path} cannot be read: {size}"
        try:
            reader.encoder.image_tokens(*size)
        except ValueError as error:
            return "image refused", (
                f"the {reader.name}'s image processor refuses {path}, of {size[0]} x {size[1]} "
                f"pixels: {error}"
            )
    return None


def problem(example: Example, kind: str, message: str) -> RecordProblem:
    """Return a problem of an example, by its id."""
    return RecordProblem(kind, f"question {example.id!r}", message)


def _sizes(paths: Iterable[Path]) -> dict[Path, tuple[int, int] | str]:
    """Return width and height of each picture by its header, or why the header cannot be read."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        return dict(zip(distinct, pool.map(_size, distinct), strict=True))


def _size(path: Path) -> tuple[int, int] | str:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # of broken bytes a decoder may raise anything
        return str(error)


def _why_unfit(task: Task, example: Example) -> str | None:
    with errors_of(task, example):
        return task.check(example)
