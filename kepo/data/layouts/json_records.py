"""JSON Lines, one record a line, and JSON lists of the same records; a file or a folder of them.

`schema` says what a record has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.data.layouts.schema import with_id
from kepo.data.records import UNPARSED, BadRecord, parsed, read_list
from kepo.disk.files import (
    MAX_JSON_BYTES,
    data_files,
    ends,
    printable,
    read_regular,
    require_regular,
)

LINES = (".jsonl",)


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``: files in sorted order, records in file order, no hidden files.

    A record without an id is called by its file, from the dataset's folder on, and its place there.
    """
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    for file in data_files(path, *LINES, ".json") if is_folder else [path]:
        name = file.relative_to(folder).as_posix()
        if ends(file.name, ".json"):
            for place, (where, record) in enumerate(read_list(file)):
                yield where, with_id(record, f"{name}[{place}]")
            continue
        for number, record in _lines(file):
            where = f"{printable(file)}:{number}" if number else printable(file)
            yield where, with_id(record, f"{name}:{number}")


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield ``(number of the line, record)`` without holding the file; empty lines hold none."""
    try:
        if file.is_dir():
            read_regular(file)  # says what is wrong with it
        require_regular(file)
        found = False
        with file.open("rb") as content:
            number = 0
            while line := content.readline(MAX_JSON_BYTES + 1):
                number += 1
                if len(line) > MAX_JSON_BYTES:
                    raise OSError(f"line {number} has over {MAX_JSON_BYTES} bytes: split it")
                if line.strip():
                    found = True
                    yield number, _record(line)
        if not found:
            raise OSError("the file is empty")
    except OSError as error:
        yield 0, BadRecord("file", f"not readable JSON Lines: {error}")


def _record(line: bytes) -> Any:
    try:
        return parsed(line)
    except UNPARSED as error:
        return BadRecord("line", f"not readable JSON: {error}")
