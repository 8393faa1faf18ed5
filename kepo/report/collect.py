"""What a run folder holds, read without trust: a killed, empty or damaged run is still a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kepo.config import RENAMED
from kepo.disk.files import printable, read_own
from kepo.errors import KepoConfigError, disk_sentence
from kepo.run.metrics import read_metrics

UNREADABLE = (OSError, ValueError, RecursionError)
"""Exceptions that reading a JSON file of any contents may raise."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report knows of one run."""

    name: str
    """What the page calls it: the end of its path."""
    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    """The records of optimiser steps in metrics.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Its records of evaluations, which have an ``eval`` of numbers by modality."""
    completions: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """The settings in the newest checkpoint, under today's names; empty if there is none."""
    data: dict[str, Any] = field(default_factory=dict)
    """The contents of data.json; empty if it cannot be read."""
    processes: int = 1
    """The number of processes that wrote the newest checkpoint."""
    missing: list[str] = field(default_factory=list)
    """Sentences about what the folder lacks."""

    @property
    def done(self) -> int:
        """The last step that the metrics have."""
        return max((record["step"] for record in self.steps), default=0)


LEFT = ("metrics.jsonl", "completions.jsonl", "data.json", "checkpoints")
"""What a run leaves in its folder; one of them is enough for a page."""


def collect(folders: Sequence[Path]) -> list[RunRecord]:
    """Return a record of each run folder; raises KepoConfigError for a path that is none."""
    for path in folders:
        if not path.is_dir():
            what = "is no folder" if path.exists() else "is not there"
            raise KepoConfigError(
                f"{path} {what}; expected the run_dir of a run, which has metrics.jsonl"
            )
        if not any((path / name).exists() for name in LEFT):
            raise KepoConfigError(
                f"{path} has none of {', '.join(LEFT)}; expected the run_dir of a run"
            )
    return [_collected(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def number(value: Any) -> float | None:
    """Return a JSON value as a finite float; None if it is anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """Return the finite numbers of a JSON object, by key."""
    found = {name: number(one) for name, one in mapping(value).items()}
    return {name: one for name, one in found.items() if one is not None}


def _names(folders: Sequence[Path]) -> list[str]:
    """Return as few last parts of each path as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [printable("/".join(part[-length:])) for part in parts]
        if len({*names}) == len({*parts}):
            return names
    return names


def _collected(folder: Path, name: str) -> RunRecord:
    missing: list[str] = []
    metrics = _log(folder / "metrics.jsonl", missing)
    evaluations = [
        {**record, "eval": values} for record in metrics if (values := numbers(record.get("eval")))
    ]
    steps = [record for record in metrics if "eval" not in record]
    completions = [
        record
        for record in _log(folder / "completions.jsonl", missing)
        if isinstance(record.get("completion"), str) and isinstance(record.get("prompt"), str)
    ]
    config, processes = _settings(folder, missing)
    data = _object(folder / "data.json", missing)
    found = RunRecord(
        name, folder, steps, evaluations, completions, config, data, processes, missing
    )
    missing += _unfinished(found)
    return found


def _unfinished(run: RunRecord) -> list[str]:
    """Return sentences about what the run has not come to."""
    found = []
    planned = number(run.config.get("steps"))
    if not run.steps:
        found.append("No optimiser step is recorded, so there are no curves.")
    elif planned is not None and run.done < planned:
        found.append(f"The run stopped after step {run.done} of {planned:.0f}, or is still going.")
    if not run.evaluations:
        found.append(
            "No evaluation is recorded: eval_data and eval_share are not set, or the run ended "
            "before its first."
        )
    elif len(run.evaluations) == 1:
        step = run.evaluations[0]["step"]
        found.append(f"Only step {step} was evaluated, so there is no before and after.")
    return found


def _log(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file; what is wrong with it is added to ``missing``."""
    if not path.exists():
        missing.append(f"{path.name} is not there.")
        return []
    try:
        lines = sum(1 for line in read_own(path).split(b"\n") if line)
        records = read_metrics(path)
    except OSError as error:
        missing.append(f"{disk_sentence(error)}.")
        return []
    if len(records) < lines:
        missing.append(
            f"{path.name} has damaged lines, which are left out: {lines - len(records)}."
        )
    return records


def _object(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.exists():
        missing.append(f"{path.name} is not there.")
        return {}
    try:
        found = json.loads(read_own(path).decode("utf-8"))
    except UNREADABLE as error:
        missing.append(f"{path.name} cannot be read: {error}.")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{path.name} holds no JSON object.")
    return mapping(found)


def _settings(folder: Path, missing: list[str]) -> tuple[dict[str, Any], int]:
    """Return the settings in the newest checkpoint that has any, and its number of processes."""
    steps = [
        path
        for path in (folder / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name, re.ASCII)
    ]
    for checkpoint in sorted(steps, key=lambda path: int(path.name[5:]), reverse=True):
        wrong: list[str] = []
        config = mapping(_object(checkpoint / "state.json", wrong).get("config"))
        if config:
            wrote = number(_object(checkpoint / "manifest.json", wrong).get("world_size"))
            named = {RENAMED.get(name, name): value for name, value in config.items()}
            return named, int(wrote or 1)
    missing.append("No checkpoint can be read, so the settings are not known.")
    return {}, 1
