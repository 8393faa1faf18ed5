"""The files of a dataset: which of them are meant, and checks that they are regular files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from kepo.errors import KepoDataError

SYSTEM = frozenset(
    name.casefold()
    for name in (
        *("__MACOSX", "Temporary Items", "Network Trash Folder", "TheVolumeSettingsFolder"),
        *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "FOUND.000"),
        *("@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"),
        *("lost+found", "__pycache__", "node_modules"),
    )
)
"""Folders that operating systems, network disks and tools leave beside the data, trash and old
states of it among them; in lower case."""
MAX_JSON_BYTES = 2**30
"""The most bytes a JSON file may have: it is read into memory several times over."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name is a copy or note that a program keeps for
    itself.

    These are ``.ipynb_checkpoints``, ``._x.json``, ``.git``, whatever else begins with a dot, and
    SYSTEM. (An editor's backup, ``x.json~`` or ``#x.json#``, does not end as a data file does.)
    """
    return name.startswith(".") or name.casefold() in SYSTEM


def ends(name: str, *endings: str) -> bool:
    """Return whether a name ends in one of these, such as .json, in capitals or not."""
    return name.lower().endswith(endings)


def data_files(folder: Path, *endings: str) -> list[Path]:
    """Return every file below a folder whose name ends so, sorted; links are followed, hidden names
    passed over.

    A path with such a name that is no file is in the list too, and so is a folder that cannot be
    listed: reading it with `read_regular` says what is wrong, and nothing is left out in silence.
    """
    return sorted(each_data_file(folder, *endings))


def each_data_file(folder: Path, *endings: str) -> Iterator[Path]:
    """Yield the files of `data_files` in the order in which they are found."""
    unlisted: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=unlisted.append):
        facts = os.stat(here)
        if (facts.st_dev, facts.st_ino) in seen:  # a link to where the walk has been
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not hidden(name))
        found = (name for name in (*folders, *files) if ends(name, *endings) and not hidden(name))
        yield from (Path(here, name) for name in found)
    yield from (Path(error.filename) for error in unlisted)


def require_regular(path: Path) -> int:
    """Return the size in bytes of a regular file; links are followed.

    Raises OSError for anything else, before it is opened: to open a FIFO waits for its writer, and
    to open a device may do anything.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        kind = next((name for test, name in _KINDS if test(facts.st_mode)), "something else")
        raise OSError(f"it is {kind}; expected a regular file")
    return facts.st_size


def read_regular(path: Path) -> bytes:
    """Read all of a regular file; OSError if it is none, exceeds MAX_JSON_BYTES or cannot be
    read."""
    if path.is_dir():
        os.listdir(path)  # one that may not be listed says so
    size = require_regular(path)
    if size > MAX_JSON_BYTES:
        raise OSError(f"it has {size} bytes; expected at most {MAX_JSON_BYTES}: split it")
    return path.read_bytes()


def read_own(path: Path) -> bytes:
    """Read all of a file that a run has written, of any size.

    Raises an OSError that names the file; if it is not a regular file, before opening it.
    """
    try:
        require_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise _named(path, error) from error


def refuse_irregular(folder: Path, names: Iterable[str]) -> None:
    """Raise OSError for the first of these names that exists in the folder but is no regular file.

    Call it before anything expensive: a folder could not be written to at the end, and a pipe would
    be waited for.
    """
    for path in (folder / name for name in names):
        try:
            require_regular(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _named(path, error) from error


def _named(path: Path, error: OSError) -> OSError:
    """Return an error that names ``path``, as the disk's own do; ours have no number."""
    return error if error.errno is not None else OSError(f"{path}: {error}; move it away")


def expanded(path: str | Path) -> Path:
    """Expand ``~`` and ``~user`` to home folders; KepoDataError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise KepoDataError(f"{printable(path)}: {error}; write the path out") from error


def printable(words: object) -> str:
    r"""Return text that any file or terminal in UTF-8 takes: a lone surrogate, which stands for a
    byte of a name that is not UTF-8, becomes ``\udc80``."""
    return str(words).encode("utf-8", "backslashreplace").decode("utf-8")
