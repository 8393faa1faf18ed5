"""A run tells its sinks what it writes to metrics.jsonl and completions.jsonl. Only rank 0 does."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kepo.config import Config
from kepo.disk.durable import write_durably
from kepo.disk.files import read_own
from kepo.distributed.processes import is_rank0, on_rank0
from kepo.errors import KepoConfigError, first_line
from kepo.run.progress import say
from kepo.run.sinks.to_tensorboard import TensorBoard
from kepo.run.sinks.to_trackio import Trackio
from kepo.run.sinks.to_wandb import WeightsAndBiases

METHODS = ("scalars", "completions")


class Sink(Protocol):
    """An object that is told of a run. It may also have ``close()``, called when the run ends, and
    a number ``lacks_after``: when the run resumes, it is first told again what was done after that
    step. Without one it is told only what happens from then on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step or an evaluation under the keys of metrics.jsonl; those of an
        evaluation are ``eval/<modality>`` and ``eval_types/<type>``. Numbers that are not finite
        are left out."""

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Take all completions of a step, as completions.jsonl has them, without ``step``."""


class Sinks:
    """The sinks of a run on rank 0; other ranks have none. One that raises is told no more: its
    error is one printed sentence, and the run goes on."""

    def __init__(self, by_name: Mapping[str, Sink]):
        self._by_name = dict(by_name)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        for name, sink in list(self._by_name.items()):
            if hasattr(sink, "close"):
                self._tell(name, sink.close)
        self._by_name = {}

    def scalars(self, step: int, record: Mapping[str, Any]) -> None:
        """Tell every sink a record of metrics.jsonl."""
        for name, sink in list(self._by_name.items()):
            self._tell(name, sink.scalars, step, numbers_of(record))

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell every sink the records of a step in completions.jsonl."""
        for name, sink in list(self._by_name.items()):
            self._tell(name, sink.completions, step, records)

    def catch_up(
        self, metrics: Sequence[Mapping[str, Any]], completions: Sequence[Mapping[str, Any]]
    ) -> None:
        """Tell each tracker the finished steps that it lacks, from what the two logs have."""
        for name, sink in list(self._by_name.items()):
            last = getattr(sink, "lacks_after", math.inf)
            numbers, texts = _by_step(metrics, last), _by_step(completions, last)
            for step in sorted({*numbers, *texts}):  # no tracker goes back a step
                for record in numbers.get(step, []):
                    self._tell(name, sink.scalars, step, numbers_of(record))
                if step in texts:
                    self._tell(name, sink.completions, step, texts[step])

    def _tell(self, name: str, method: Any, *told: Any) -> None:
        if name not in self._by_name:
            return
        try:
            method(*told)
        except Exception as error:  # of somebody else's code, and no reason to end a run
            del self._by_name[name]
            say(
                f"{name} is told no more: {type(error).__name__}: {first_line(error)}; the run "
                "goes on, and metrics.jsonl has everything"
            )


def open_sinks(config: Config, done: int, sinks: Sequence[Sink] = ()) -> Sinks:
    """Return the trackers in ``config.report_to``, and ``sinks`` of the user's own. All ranks call.

    done: the step that the run resumes after, -1 if it is new. Raises KepoConfigError for a tracker
    that does not start, and for a sink that lacks a method.
    """
    for place, sink in enumerate(sinks):
        lacks = [name for name in METHODS if not callable(getattr(sink, name, None))]
        if lacks:
            raise KepoConfigError(
                f"sinks[{place}] is a {type(sink).__name__} without {' and '.join(lacks)}; "
                "expected an object with scalars(step, values) and completions(step, records)"
            )
    folder, settings = Path(config.run_dir), dataclasses.asdict(config)
    found: dict[str, Sink] = {}
    on_rank0(lambda: found.update(_trackers(config.report_to, folder, settings, done)))
    if is_rank0():
        found |= {f"sinks[{place}]": sink for place, sink in enumerate(sinks)}
    return Sinks(found)


def _trackers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], done: int
) -> dict[str, Sink]:
    found: dict[str, Sink] = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = _tracker(name, folder, settings, done)
        except Exception as error:
            Sinks(found).__exit__()
            raise KepoConfigError(
                f"report_to: {name} does not start: {type(error).__name__}: {first_line(error)}; "
                "mend that, or leave it out"
            ) from error
    return found


def _tracker(name: str, folder: Path, settings: Mapping[str, Any], done: int) -> Sink:
    if name == "tensorboard":
        return TensorBoard(folder, settings, done)
    known_as = run_id(folder)
    if name == "wandb":
        return WeightsAndBiases(folder, settings, done, known_as)
    return Trackio(folder, settings, done, known_as)


def run_id(folder: Path) -> str:
    """Return the id under which trackers know the run in a folder, and find it when it resumes; it
    is made at first use and kept in the folder, as ``run_id``."""
    path = folder / "run_id"
    if path.exists():
        return read_own(path).decode("ascii").strip()
    made = secrets.token_hex(4)
    write_durably(path, made + "\n")
    return made


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record by key; those of a table within it by ``key/name``."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": x for name, x in numbers_of(value).items()}
        elif key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            found[key] = value
    return found


def _by_step(records: Sequence[Mapping[str, Any]], after: float) -> dict[int, list[dict[str, Any]]]:
    """Return the records of each step above ``after``, in their order, without the step."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["step"] > after:
            others = {key: value for key, value in record.items() if key != "step"}
            steps.setdefault(record["step"], []).append(others)
    return steps
