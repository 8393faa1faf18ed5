"""Files that are whole after a power loss: written beside, synced, then renamed into place.

A disk may keep a rename and lose what the file holds: whoever renames without syncing finds an
empty file in the place of the old one. Whatever kepo renames or appends goes through here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
"""Error numbers of file systems that cannot sync a folder, or do not let it be opened for that."""


def write_durably(path: Path, content: str | bytes) -> None:
    """Write ``content`` to the file, or leave the file as it was; text is written in UTF-8.

    What UTF-8 has no bytes for (half a surrogate pair, from a file name) is written as its escape,
    which JSON reads back.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, with the same ending as ``path``; it takes that one's place when the
    block ends, and is removed if the block fails. A device or pipe is written to directly."""
    path = Path(os.path.realpath(path)) if Path(path).is_file() else Path(path)
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            yield path
            return
        part = unfinished(path)
        try:
            yield part
            sync(part)
            part.replace(path)
        except BaseException as error:
            with suppress(OSError):  # the first error is the one to tell
                part.unlink()
            if isinstance(error, OSError) and error.filename == str(part):
                error.filename = str(path)  # nobody knows the other name
            raise
        sync(path.parent)


def append_durably(path: Path, text: str) -> None:
    """Append lines and wait until they are on disk. The file must exist: its name is not synced."""
    with naming(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make the folder and those above it, all of which are there after a power loss."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; where the file system cannot sync
    folders, it is trusted to keep their order."""
    with naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
                raise


@contextmanager
def naming(path: Path, written: Path | None = None) -> Iterator[None]:
    """Let every OSError of the block name a file: those of write and sync name none, and get
    ``path``.

    written: the folder in which ``path`` is made, under a temporary name; an error that names a
    file there is made to name the file it would have become.

    Libraries in Rust (safetensors, tokenizers) raise what the disk said as errors of their own,
    with "(os error 28)" in the text: those become OSErrors.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        if written is not None:
            for name in ("filename", "filename2"):
                place = getattr(error, name)
                if isinstance(place, str) and Path(place).is_relative_to(written):
                    setattr(error, name, str(path / Path(place).relative_to(written)))
        raise
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said is None:
            raise
        number = int(said[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def unfinished(path: Path) -> Path:
    """Return the name that ``path`` has while this process writes or removes it."""
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that no longer run on this machine left unfinished in a folder."""
    for path in folder.iterdir():
        name = re.fullmatch(r"\.tmp-(\d+)(-.+)?", path.name, re.ASCII)
        if name and not _runs(int(name[1])):
            remove(path)


def remove(path: Path) -> None:
    """Remove what is not needed any more; a failure is printed, and nothing is lost by it."""
    try:
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        print(f"{path} is not needed any more and cannot be removed: {error}")


def _runs(process: int) -> bool:
    """Return whether another process of that number is running here."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        pass
    return True


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def as_json(value: Any, **settings: Any) -> str:
    """Return standard JSON: NaN and the infinities, which it has no word for, are null.

    settings: json.dumps's.
    """
    return json.dumps(_finite(value), allow_nan=False, **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
