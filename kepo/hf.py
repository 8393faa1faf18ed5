"""Folders that ``datasets.save_to_disk`` wrote, with columns ``image, problem, solution``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kepo.errors import KepoDataError

COLUMNS = ("image", "problem", "solution")
DICT, SINGLE = "dataset_dict.json", "state.json"


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of medr1's shape; ``image`` is a function, as all images would not fit in memory."""
    try:
        import datasets
    except ImportError as error:
        raise KepoDataError(
            f"hf: {path} was written by the library datasets, which is not installed: "
            "pip install datasets"
        ) from error

    path = _one_split(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise KepoDataError(f"hf: {path} cannot be read by datasets: {error}") from error
    if missing := [name for name in COLUMNS if name not in dataset.column_names]:
        raise KepoDataError(
            f"hf: {path} has columns {dataset.column_names} and lacks {missing}; expected "
            f"{', '.join(COLUMNS)}"
        )
    if isinstance(dataset.features["image"], datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for index, record in enumerate(dataset.remove_columns("image")):
        given = {"question_id": f"{path.name}[{index}]"} | record
        yield f"{path}[{index}]", given | {"image": partial(_image, dataset, index)}


def _one_split(path: Path) -> Path:
    """The folder itself, or that of its only split."""
    if not (path / DICT).is_file():
        return path
    try:
        splits = json.loads((path / DICT).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError) as error:
        raise KepoDataError(f"hf: {path / DICT} cannot be read: {error!r}") from error
    if len(splits) != 1:
        raise KepoDataError(f"hf: {path} holds the splits {splits}; give {path / splits[0]}")
    return path / splits[0]


def _image(dataset: Any, index: int) -> str | bytes:
    image = dataset[index]["image"]
    if isinstance(image, dict):
        return image["bytes"] or image["path"] or ""
    return image or ""
