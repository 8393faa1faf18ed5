"""Tables of Arrow, which Parquet and datasets have in common: their rows as records.

Records are as `schema` says, or in Med-R1's shape, with columns ``problem, solution`` and ``image``
or ``images``. Pictures stay where they are until a record is kept, as all would not fit in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kepo.data.example import Example
from kepo.data.layouts import medr1, schema
from kepo.data.records import BadRecord, Parsed
from kepo.disk.files import printable
from kepo.errors import KepoDataError

PROBLEM = ("problem", "solution")
"""The columns, beside image or images, of records in Med-R1's shape."""

Piece = Callable[[list[str]], Any]
"""A function: names of columns -> these of some successive rows, as a pyarrow.Table."""


@dataclass(frozen=True)
class Table:
    """A table that is read in pieces."""

    place: str
    """The path or name of the dataset, for messages."""
    name: str
    """The name that ids are made with."""
    reader: str
    """The library that reads it."""
    schema: Any
    """The names and types of its columns, a pyarrow.Schema."""
    pieces: Sequence[Piece]


def required(package: str, path: object) -> Any:
    """Import a package that only some layouts need; KepoDataError with the remedy without it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise KepoDataError(
            f"{printable(path)} is read by the library {package}, which is not installed or does "
            f"not work ({error}): pip install 'kepo[hf]'"
        ) from error


def rows_of(table: Table) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``; ``images`` of a record is a function that fetches them.

    Columns of bytes, such as further pictures or sounds, are left out, unless they are read here.
    Raises KepoDataError if the columns are not those of a dataset.
    """
    column = _checked(table)
    texts = [
        field.name
        for field in table.schema
        if field.name != column and (field.name in schema.READ or not _has_bytes(field.type))
    ]
    pictures = None if column is None else _Pictures(column)
    start = 0
    for piece in table.pieces:
        try:
            records = _records(piece(texts))
        except Exception as error:  # of broken files a reader may raise anything
            message = f"cannot be read by {table.reader} from row {start} on: {_said(error)}"
            yield table.place, BadRecord("file", message)
            continue
        for index, record in enumerate(records):
            if isinstance(record, dict) and pictures is not None:
                record["images"] = partial(pictures.of, piece, index)
            place = f"[{start + index}]"
            yield f"{table.place}{place}", schema.with_id(record, f"{table.name}{place}")
        start += len(records)


def parse(record: Any, where: str) -> Parsed:
    is_problem = isinstance(record, dict) and _is_problem([*record])
    return (medr1.parse if is_problem else schema.parse)(record, where)


def quirks(record: dict[str, Any], example: Example) -> list[str]:
    return [] if _is_problem([*record]) else schema.quirks(record, example)


def _is_problem(names: Sequence[str]) -> bool:
    return "problem" in names and not {*schema.ASKS} & {*names}


def _checked(table: Table) -> str | None:
    """Return the column of the pictures, if there is one; raises KepoDataError."""
    name, names = table.place, list(table.schema.names)
    if len({*names}) < len(names):
        raise KepoDataError(f"{name} has the columns {names}; expected each once")
    columns = [column for column in schema.IMAGES if column in names]
    if len(columns) > 1:
        raise KepoDataError(f"{name} has the columns image and images; expected one of them")
    if _is_problem(names):
        missing = [column for column in PROBLEM if column not in names]
        if missing := [*missing, *([] if columns else ["image"])]:
            raise KepoDataError(
                f"{name} has the columns {names} and lacks {missing}; expected problem, solution "
                "and image"
            )
    elif not {*schema.ASKS} & {*names}:
        raise KepoDataError(
            f"{name} has the columns {names}; expected question, prompt or messages, and answer or "
            "solution (or Med-R1's problem, solution and image)"
        )
    return columns[0] if columns else None


def _has_bytes(kind: Any) -> bool:
    """Return whether values of an Arrow type have bytes in them."""
    inner = (kind.field(number).type for number in range(kind.num_fields))
    return "binary" in str(kind).partition("<")[0] or any(map(_has_bytes, inner))


def _records(part: Any) -> list[Any]:
    """Return the rows of a pyarrow.Table, with a BadRecord for one that cannot be read."""
    try:
        return part.to_pylist()
    except Exception:  # such as text that is not UTF-8
        return [_record(part.slice(index, 1)) for index in range(part.num_rows)]


def _record(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except Exception as error:
        return BadRecord("field", f"cannot be read: {_said(error)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Pictures:
    """The column of pictures, of which one piece at a time is held."""

    def __init__(self, column: str):
        self.column = column
        self.piece: Piece | None = None
        self.values: Any = None

    def of(self, piece: Piece, index: int) -> list[str | bytes]:
        try:
            if piece is not self.piece:
                self.piece = self.values = None  # free before the next is read
                self.values = piece([self.column]).column(self.column)
                self.piece = piece
            value = self.values[index].as_py()
        except Exception as error:
            raise BadRecord("image missing", f"its image cannot be read: {error}") from error
        if self.column == "images":
            return [schema.stored(image) for image in value or ()]
        return [] if value is None else [schema.stored(value)]


def dataset_table(dataset: Any, place: Path | str, name: str) -> Table:
    """Return a ``datasets.Dataset`` as a table; its pictures are not decoded."""

    def piece(start: int, columns: list[str]) -> Any:
        return dataset.select_columns(columns).with_format("arrow")[start : start + _ROWS]

    starts = range(0, len(dataset), _ROWS)
    pieces = [partial(piece, start) for start in starts]
    return Table(printable(place), name, "datasets", dataset.features.arrow_schema, pieces)


_ROWS = 256  # of a piece
