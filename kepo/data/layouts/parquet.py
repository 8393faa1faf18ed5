"""Parquet files, or a folder of them, with the columns that `arrow` names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kepo.data.layouts.arrow import Table, required, rows_of
from kepo.data.records import BadRecord
from kepo.disk.files import data_files, printable, read_regular, require_regular

ENDS = (".parquet",)


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``: files in sorted order, records in file order, no hidden files."""
    parquet = required("pyarrow.parquet", path)
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    for file in data_files(path, *ENDS) if is_folder else [path]:
        try:
            if file.is_dir():
                read_regular(file)  # says what is wrong with it
            require_regular(file)
            content = parquet.ParquetFile(file)
        except Exception as error:  # of a broken file pyarrow may raise anything
            yield printable(file), BadRecord("file", f"not readable Parquet: {error}")
            continue
        with content:
            pieces = [
                partial(_group, parquet, file, number) for number in range(content.num_row_groups)
            ]
            name = file.relative_to(folder).as_posix()
            table = Table(printable(file), name, "pyarrow", content.schema_arrow, pieces)
        yield from rows_of(table)


def _group(parquet: Any, file: Path, number: int, columns: list[str]) -> Any:
    """Return one group of a file's rows. The file is opened each time, as there may be thousands
    of them."""
    with parquet.ParquetFile(file) as content:
        return content.read_row_group(number, columns=columns)
