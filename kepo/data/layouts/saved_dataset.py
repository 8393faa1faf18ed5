"""Folders that ``datasets.save_to_disk`` wrote, with the columns that `arrow` names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.data.layouts.arrow import dataset_table, required, rows_of
from kepo.disk.files import printable, read_regular, require_regular
from kepo.errors import KepoDataError

DICT, SINGLE = "dataset_dict.json", "state.json"


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``; ``images`` of a record is a function."""
    datasets = required("datasets", path)
    path = _one_split(path)
    try:
        for file in (*path.glob("*.json"), *path.glob("*.arrow")):
            require_regular(file)
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # broken files may make it raise anything
        raise KepoDataError(
            f"{printable(path)} cannot be read by datasets: {type(error).__name__}: {error}"
        ) from error
    yield from rows_of(dataset_table(dataset, path, path.name))


def _one_split(path: Path) -> Path:
    """Return the folder itself, or the folder of its only split."""
    if not (path / DICT).is_file():
        return path
    try:
        splits = json.loads(read_regular(path / DICT).decode("utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KepoDataError(f"{path / DICT} cannot be read: {error!r}") from error
    if not isinstance(splits, list) or not splits or not all(isinstance(s, str) for s in splits):
        raise KepoDataError(f"{path / DICT} has splits={splits!r}; expected a list of names")
    if len(splits) != 1:
        raise KepoDataError(f"{path} holds the splits {splits}; give {path / splits[0]}")
    return path / splits[0]
