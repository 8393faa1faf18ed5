"""Folders that ``datasets.save_to_disk`` wrote, with columns ``image, problem, solution``.

A column ``images`` of lists may stand in place of ``image``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kepo.data.records import BadRecord
from kepo.disk.files import printable, read_regular, require_regular
from kepo.errors import KepoDataError

COLUMNS = ("problem", "solution")
IMAGES = ("image", "images")  # a dataset has one of these columns
DICT, SINGLE = "dataset_dict.json", "state.json"


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)`` in medr1's shape.

    ``images`` is a function, as all images would not fit in memory.
    """
    try:
        import datasets
    except ImportError as error:
        raise KepoDataError(
            f"{path} was written by the library datasets, which is not installed: "
            "pip install datasets"
        ) from error

    path = _one_split(path)
    try:
        for file in (*path.glob("*.json"), *path.glob("*.arrow")):
            require_regular(file)
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # broken files may make it raise anything
        raise _unread(path, error) from error
    columns = [name for name in IMAGES if name in dataset.column_names]
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if not columns:
        missing = ["image", *missing]
    if missing:
        raise KepoDataError(
            f"{path} has columns {dataset.column_names} and lacks {missing}; expected "
            f"{', '.join(COLUMNS)} and image, or images"
        )
    if len(columns) > 1:
        raise KepoDataError(f"{path} has the columns image and images; expected one of them")
    (column,) = columns
    dataset = dataset.cast_column(column, _undecoded(dataset.features[column], datasets))
    texts = dataset.remove_columns(column)
    for index in range(len(texts)):
        try:
            record = texts[index]
        except Exception as error:
            raise _unread(path, error) from error
        given = {"question_id": f"{path.name}[{index}]"} | record
        where = f"{printable(path)}[{index}]"
        yield where, given | {"images": partial(_images, dataset, index, column)}


def _unread(path: Path, error: Exception) -> KepoDataError:
    return KepoDataError(
        f"{printable(path)} cannot be read by datasets: {type(error).__name__}: {error}"
    )


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


def _undecoded(feature: Any, datasets: Any) -> Any:
    """Return the column's feature with images left as they were stored, not decoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return feature


def _images(dataset: Any, index: int, column: str) -> list[str | bytes]:
    try:
        value = dataset[index][column]
    except Exception as error:
        raise BadRecord("image missing", f"datasets cannot give the image: {error}") from error
    if column == "image":
        return [_stored(value)]
    return [_stored(image) for image in value or ()]


def _stored(image: Any) -> str | bytes:
    if isinstance(image, dict):
        return image["bytes"] or image["path"] or ""
    return image or ""
