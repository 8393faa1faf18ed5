"""Folders that are either complete or absent, and that list their own contents.

manifest.json lists every file with size and sha256, and has a sha256 of its own text, so any change
to any file, itself included, is seen. It also tells the run's own files from others: a folder
without a manifest, or with files that it does not list, holds something of somebody else's, and is
set aside, never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from kepo.disk.durable import (
    is_folder,
    make_folder,
    naming,
    remove,
    remove_leftovers,
    sync,
    unfinished,
)
from kepo.disk.files import SYSTEM, read_own
from kepo.distributed.processes import world_size
from kepo.errors import KepoCheckpointError

MANIFEST = "manifest.json"
LITTER = re.compile(
    "|".join([r"\.DS_Store", r"\._.*", r"\.nfs.*", r"\.cache", *map(re.escape, SYSTEM)]),
    re.IGNORECASE,
)
"""Names of what systems and tools leave in any folder: nobody's, and removed with the folder."""
UNREADABLE = (OSError, ValueError, TypeError, RecursionError)
"""Exceptions that reading a manifest of any contents may raise."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that appears at ``target`` complete or not at all, in place of an existing
    one."""
    folder = begin_folder(target)
    try:
        with naming(target, folder):
            yield folder
            finish_folder(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def begin_folder(target: Path) -> Path:
    """Make a new folder beside ``target``; remove what killed processes of this machine left
    there."""
    make_folder(target.parent)
    remove_leftovers(target.parent)
    folder = target.parent / f".tmp-{os.getpid()}"
    with naming(target, folder):
        folder.mkdir()
    return folder


def finish_folder(folder: Path, target: Path) -> None:
    """Make ``folder`` durable, then rename it to ``target``.

    A folder of the run that is already there is replaced; one that holds something of somebody
    else's is set aside.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600
        sync(path)
    old = None
    if os.path.lexists(target):
        if (why := foreign(target)) is not None:
            set_aside(target, why)
        else:
            old = unfinished(target)
            target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old is not None:
            with suppress(OSError):
                old.rename(target)
        raise
    sync(target.parent)
    if old is not None:
        remove(old)


def write_manifest(
    folder: Path, known: Mapping[str, dict[str, Any]] | None = None, **facts: Any
) -> None:
    """List every file with size and sha256; call it after all of them are written.

    known: entries that `described` returned for files in it, which are not read again.
    """
    files = dict(known or {})
    for name in sorted(_names(folder)):
        if name != MANIFEST and name not in files:
            files[name] = described(folder / name)
    manifest = {**facts, "world_size": world_size(), "files": files}
    manifest["sha256"] = _own_digest(manifest)
    (folder / MANIFEST).write_text(_text(manifest), encoding="utf-8")


def described(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify(folder: Path, parts: Sequence[str] = ()) -> str | None:
    """Say what is wrong with a folder that has a manifest; None if nothing is. Raises nothing.

    parts: prefixes, for each of which there must be a file whose name begins with it. Files that
    the manifest does not list are no fault: see `as_saved`.
    """
    try:
        return _fault(folder, parts)
    except UNREADABLE as error:
        return str(error)


def unlisted(folder: Path) -> list[str]:
    """Return the files in a folder that its readable manifest does not list; LITTER apart."""
    return sorted(_names(folder) - _manifest(folder)["files"].keys() - {MANIFEST})


def is_described(folder: Path) -> bool:
    """Return whether a folder has a manifest of its own, whatever else is in it. Raises nothing."""
    try:
        return bool(_manifest(folder))
    except UNREADABLE:
        return False


def foreign(path: Path) -> str | None:
    """Say why a folder is not the run's to remove; None if everything in it was saved with it.
    Raises nothing."""
    try:
        others = unlisted(path)
    except UNREADABLE as error:
        return str(error)
    return f"{others[0]} was not saved with it" if others else None


def set_aside(path: Path, why: str) -> None:
    """Give ``path`` another name beside its own, and print that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    path.rename(aside)
    print(f"{path} is not the run's own ({why}), and nothing of it is removed: it is now {aside}")


def as_saved(folder: Path) -> Path:
    """Return the folder to read ``folder`` from: itself, or if it has other files too, a folder
    beside it with links to the listed files alone. A library that reads every file it finds then
    reads no others.

    The links are removed with the next checkpoint, like what a killed process left. Raises OSError
    if the folder can no longer be read, KepoCheckpointError if it is no longer what was verified.
    """
    try:
        if not unlisted(folder):
            return folder
        names = [*_manifest(folder)["files"], MANIFEST]
    except OSError:
        raise
    except UNREADABLE as error:
        raise KepoCheckpointError(f"{folder}: {error}; run the same command again") from error
    remove_leftovers(folder.parent)
    links = unfinished(folder)
    for name in names:
        link = links / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(folder / name))
    return links


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder. Raises ValueError, in words, if it is not as it was written
    or belongs to another folder, and others of UNREADABLE."""
    if not is_folder(folder):
        raise ValueError("it is a file or a link, not a folder")
    try:
        text = read_own(folder / MANIFEST).decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from error
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or _text(manifest) != text:
        raise ValueError(f"{MANIFEST} is not as it was written")
    # Manifests of earlier checkpoints have no digest of themselves.
    own = manifest.pop("sha256", None)
    if not manifest.keys() <= {"step", "world_size", "files"}:
        raise ValueError(f"{MANIFEST} has {sorted(manifest)}")
    if own is not None and own != _own_digest(manifest):
        raise ValueError(f"{MANIFEST} is not as it was written")
    if "step" in manifest and folder.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"{MANIFEST} says step {manifest['step']}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} lists no files")
    for name in files:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{MANIFEST} lists {name}, outside the folder")
    return manifest


def _fault(folder: Path, parts: Sequence[str]) -> str | None:
    manifest = _manifest(folder)
    if parts and "step" not in manifest:
        return f"{MANIFEST} has no step"
    for part in parts:
        if not any(name.startswith(part) for name in manifest["files"]):
            return f"{MANIFEST} lists no {part}"
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
            return f"{name} is not the file that was saved"
        if described(path) != facts:
            return f"{name} is not the file that was saved"
    return None


def _names(folder: Path) -> set[str]:
    """Return the names of all files in a folder and those below it, without LITTER and the folders
    themselves; links are not followed."""
    found: set[str] = set()
    for here, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        folders[:] = [name for name in folders if not LITTER.fullmatch(name)]
        found.update(
            Path(here, name).relative_to(folder).as_posix()
            for name in (*files, *links)
            if not LITTER.fullmatch(name)
        )
    return found


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(manifest).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
