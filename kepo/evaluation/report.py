"""Measure a saved model on questions, with intervals.

It answers a dataset of any layout, greedily or with several samples of each question; the table is
by modality and type of question. `chance` is what blind guessing would score on the same questions:
with four options each it would be 0.25, but many have two or three. An answer is unparsed where it
holds no single well-formed <answer>, or box without one; it counts as wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.data.example import Example
from kepo.data.images import digests_of
from kepo.data.layouts import from_python
from kepo.data.load import DataReport, layout_of, load_examples
from kepo.data.records import counted
from kepo.data.run_data import as_record, capped, readable
from kepo.disk.durable import as_json, write_durably
from kepo.errors import KepoConfigError, KepoDataError
from kepo.evaluation.answers import answers_of
from kepo.evaluation.scores import Scores, judged, tabulated
from kepo.flags import command_line
from kepo.models.device import known_device
from kepo.models.reading import encoder_of, hide_transformers_bars, read_config
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.rollout.encodable import Faults, Reader, faults_of, left_out, plain_reader
from kepo.sections import RewardConfig, TaskConfig
from kepo.tasks.environment import Environment, environment_of, listed
from kepo.tasks.rewards import Reward, reward_name
from kepo.tasks.task import Task
from kepo.words import at_home

IN_MEMORY = "<model>"
"""What stands for a model that came as an argument."""


@dataclass(frozen=True)
class Evaluation(TaskConfig):
    """Settings of an evaluation."""

    model: str
    """Folder or Hub name of a model that kepo trains; of a run, its checkpoint's policy/."""
    data: str
    """Data in any of the layouts of train_data."""
    rewards: tuple[str, ...] = ("accuracy",)
    """Rewards whose means are told beside accuracy, which always is: format, or functions of your
    own, as file.py:function or package.module:function."""
    samples: int = 1
    """Completions of each question. With several, pass@k and maj@k are told: the chances that one
    of k is right, and that the answer most of k give is right."""
    temperature: float | None = None
    """Temperature of the samples; 0 is greedy. None means greedy with one sample, else 1."""
    top_p: float = 1.0
    """Nucleus sampling threshold. 1 disables it."""
    seed: int = 0
    """Seed of the samples."""
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
    """Completions generated at once."""
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


def evaluate(
    model: str | Path | VLM,
    data: str | Path | Iterable[Example | Mapping[str, Any]],
    *,
    task: Task | str | None = None,
    rewards: Sequence[str | Reward] | str | Reward = ("accuracy",),
    samples: int = 1,
    temperature: float | None = None,
    **settings: Any,
) -> Scores:
    """Measure a model on questions.

    model: a folder or Hub name; of a run, its checkpoint's ``policy``; or a model that is loaded.
    data: a dataset of any layout, or a list of `Example` or of records as a JSON Lines file has
    them. task: an object, or a name as in a recipe; None means multiple_choice. rewards: names or
    functions, whose means are told beside accuracy, which always is. samples: completions of each
    question; with several, ``pass@k`` and ``maj@k`` are told. temperature: None means greedy with
    one sample, else 1. settings: those of ``kepo evaluate``, such as ``limit=100`` or
    ``max_completion_length=512``; dtype and device are for a model that is not loaded yet.

    Raises KepoConfigError, KepoDataError or KepoCheckpointError where settings, data or model are
    not usable, and KepoRewardError where a reward is not.
    """
    if not (task is None or isinstance(task, Task | str)):
        raise KepoConfigError(f"task={task!r}; expected an object of kepo.Task, or its name")
    rewards = listed(rewards) or ()
    if task is not None:
        settings["task"] = task if isinstance(task, str) else type(task).__name__
    known = {field.name for field in dataclasses.fields(Evaluation)} - {"json"}
    if unknown := sorted(settings.keys() - known):
        raise KepoConfigError(f"evaluate: {unknown} are no settings; see kepo evaluate --help")
    named = Evaluation(
        model=IN_MEMORY if isinstance(model, VLM) else str(model),
        data=str(data) if isinstance(data, (str, Path)) else from_python.NAME,
        rewards=tuple(map(reward_name, rewards)),
        samples=samples,
        temperature=temperature,
        **settings,
    )
    return evaluation(
        named,
        vlm=model if isinstance(model, VLM) else None,
        data=None if isinstance(data, (str, Path)) else data,
        task=task if isinstance(task, Task) else None,
        rewards=rewards,
    )


def evaluation(
    settings: Evaluation,
    *,
    vlm: VLM | None = None,
    data: Iterable[Any] | None = None,
    task: Task | None = None,
    rewards: Sequence[str | Reward] | None = None,
) -> Scores:
    """Do what ``kepo evaluate`` and `evaluate` do; objects take the places of what the settings
    name, where they are not None."""
    hide_transformers_bars()
    settings = at_home(settings, *PATHS)
    params = sampling(settings)
    dtypes = ("float32", "bfloat16", "float16")
    if settings.dtype not in dtypes:
        raise KepoConfigError(f"dtype={settings.dtype!r}; expected one of {', '.join(dtypes)}")
    known_device(settings.device)
    if data is None:
        layout_of(settings.data)  # before a model is looked for, perhaps on the Hub
    else:
        data = from_python.listed(data)
    env = environment(settings, task, rewards)
    reader = reader_of(settings, env.task) if vlm is None else _reader(vlm, settings, env.task)
    examples, report = questions(settings, env.task, reader, data)
    if vlm is None:
        vlm = VLM.load(settings.model, dtype=settings.dtype, device=settings.device)
    said = answers_of(
        vlm,
        examples,
        env.task,
        params,
        seed=settings.seed,
        batch_size=settings.batch,
        progress=True,
    )
    each = [(example, one) for example, some in zip(examples, said, strict=True) for one in some]
    rewarded = env.scores(
        [example for example, _ in each],
        [one.text for _, one in each],
        [one.ids for _, one in each],
    )
    answers = [
        judged(env.task, example, some, rewarded[place * params.n : (place + 1) * params.n])
        for place, (example, some) in enumerate(zip(examples, said, strict=True))
    ]
    return Scores(
        settings=dataclasses.asdict(settings),
        data=as_record(report),
        **tabulated(answers),
        answers=answers,
    )


def sampling(settings: Evaluation) -> SamplingParams:
    """Return how completions are drawn. Raises KepoConfigError for numbers out of range."""
    for name in ("limit", "batch", "max_completion_length", "samples"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise KepoConfigError(f"{name}={value}; expected a number >= 1")
    temperature = settings.temperature
    if temperature is None:
        temperature = 0.0 if settings.samples == 1 else 1.0
    if settings.samples > 1 and temperature == 0:
        raise KepoConfigError(
            f"temperature={settings.temperature} with samples={settings.samples}: greedy answers "
            "are all the same; give a temperature above 0, or one sample"
        )
    return SamplingParams(
        n=settings.samples,
        max_tokens=settings.max_completion_length,
        temperature=temperature,
        top_p=settings.top_p,
    )


def environment(
    settings: Evaluation, task: Task | None, rewards: Sequence[str | Reward] | None
) -> Environment:
    """Return the task and the rewards. Raises KepoConfigError for one that cannot be used here."""
    given = settings.rewards if rewards is None else rewards
    if "overlong" in given:
        raise KepoConfigError(
            "rewards has overlong, which fines long completions in training; leave it out here"
        )
    named = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TaskConfig)}
    return environment_of(RewardConfig(**named), task, given)


def reader_of(settings: Evaluation, task: Task) -> Reader:
    """Return the model as a reader that is asked; only its config and encoder are read."""
    encoder = encoder_of(settings.model, read_config(settings.model))
    return plain_reader(encoder, task, settings.max_completion_length)


def _reader(vlm: VLM, settings: Evaluation, task: Task) -> Reader:
    return plain_reader(vlm.encoder, task, settings.max_completion_length)


def questions(
    settings: Evaluation,
    task: Task,
    reader: Reader | None = None,
    data: Sequence[Any] | None = None,
) -> tuple[list[Example], DataReport]:
    """Return the questions to ask, every image decoded once, and a report with the others' faults.

    reader: the model they are asked of; questions that it cannot be asked are left out. None means
    any model. data: the questions, if they came as an argument.
    """
    examples, report = load_examples(
        settings.data if data is None else data,
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


def main(arguments: Sequence[str]) -> None:
    """Run ``kepo evaluate``."""
    [settings] = command_line(
        Evaluation,
        prog="kepo evaluate",
        usage="MODEL DATA [OPTIONS]",
        args=arguments,
        description=__doc__,
    )
    settings = at_home(settings, *PATHS)
    if settings.json is not None:  # known now, not after an hour of answers
        folder = Path(settings.json).resolve().parent
        if not folder.is_dir():
            raise KepoConfigError(f"json={settings.json!r}: its folder is not there; make it first")
        if Path(settings.json).is_dir() or not os.access(folder, os.W_OK):
            raise KepoConfigError(f"json={settings.json!r} cannot be written; choose another file")
    scores = evaluation(settings)
    bad = scores.data["bad_records"]
    if bad:
        kinds = (f"{kind} {count}" for kind, count in bad.items())
        print(f"left out: {counted(bad)} ({', '.join(kinds)})")
    print(scores)
    if settings.json is not None:
        text = as_json(scores.record(), indent=1, ensure_ascii=False)
        write_durably(Path(settings.json), text + "\n")
