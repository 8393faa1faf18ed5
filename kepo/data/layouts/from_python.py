"""Questions that a program holds: a list of `Example`, or of records as `schema` describes them.

    kepo.train(config, data=[{"question": "What is 6 * 7?", "answer": "42"}, ...])

Pictures are paths, bytes, or images of Pillow; a ``datasets.Dataset`` is such a list too.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from kepo.data.example import Example
from kepo.data.layouts import schema
from kepo.data.records import BadRecord, Parsed, Sources, shown
from kepo.errors import KepoDataError

NAME = "<data>"
"""What stands in ``train_data`` of a run whose questions came as an argument."""


def listed(data: Iterable[Any]) -> list[Any]:
    """Return the questions as a list; KepoDataError for what is no collection of them."""
    if isinstance(data, (str, bytes, Path, Mapping)) or not isinstance(data, Iterable):
        raise KepoDataError(
            f"data is {shown(data)}; expected a list of kepo.Example, or of dicts with question "
            "and answer"
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise KepoDataError(
            f"data is a {type(data).__name__}, a list of its columns' names; give "
            "data.to_dict('records')"
        )
    return list(data)


def rows(data: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for place, record in enumerate(data):
        where = f"data[{place}]"
        yield where, record if isinstance(record, Example) else schema.with_id(record, where)


def parse(record: Any, where: str, *, folder: Path | None) -> Parsed:
    """Return the example and its pictures; relative paths begin in ``folder``, if one is given."""
    if isinstance(record, Example):
        parsed, sources = schema.parse(_as_record(record), where)
        # What an example says of itself is kept; the record's shape was ours.
        example = replace(parsed, columns=record.columns)
    else:
        example, sources = schema.parse(_with_stored_pictures(_plain(record)), where)
    return example, _from(folder, sources)


def quirks(record: Any, example: Example) -> list[str]:
    return schema.quirks(record if isinstance(record, dict) else {}, example)


def _as_record(example: Example) -> dict[str, Any]:
    """Return an example as a record, so that it passes the checks of all others."""
    record: dict[str, Any] = {
        "id": example.id,
        "options": list(example.options),
        "answer": example.answer,
    }
    for name in ("modality", "question_type", "rationale"):
        record[name] = getattr(example, name) or None
    record["images"] = [str(path) for path in example.images]
    if not example.earlier:
        return record | {"question": example.question}
    turns = [*example.earlier, ("user", example.question)]
    return record | {"messages": [{"role": role, "content": text} for role, text in turns]}


def _plain(record: Any) -> Any:
    """Return the record with the fields that are read as JSON has them: NumPy's numbers and arrays,
    and tuples, are numbers and lists."""
    if not isinstance(record, dict):
        return record
    if odd := [key for key in record if not isinstance(key, str)]:
        raise BadRecord("field", f"has the key {shown(odd[0])}; expected texts")
    found = dict(record)
    for name in ({*schema.READ} - {*schema.IMAGES}) & {*record}:
        value = record[name]
        if hasattr(value, "tolist"):
            found[name] = value.tolist()
        elif isinstance(value, tuple):
            found[name] = list(value)
    return found


def _with_stored_pictures(record: Any) -> Any:
    """Return the record with a function in place of images of Pillow, which makes files of them;
    called for a record that is kept, and not for all at once."""
    if not isinstance(record, dict):
        return record
    for name in schema.IMAGES:
        value = record.get(name)
        images = value if isinstance(value, list) else [value]
        if any(isinstance(image, Image.Image) for image in images):
            others = {key: x for key, x in record.items() if key != name}
            return others | {"images": partial(_files, images)}
    return record


def _files(images: Sequence[Any]) -> list[str | bytes]:
    return [_png(x) if isinstance(x, Image.Image) else schema.stored(x) for x in images]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _from(folder: Path | None, sources: Sources) -> Sources:
    if folder is None or callable(sources):
        return sources
    return tuple(str(folder / one) if isinstance(one, str) and one else one for one in sources)
