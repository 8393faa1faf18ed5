"""Folders that are whole or not there, and that say themselves what is in them.

manifest.json lists every file with size and sha256, and has a sha256 of its own text, so any change
to any file, itself included, is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from kepo.distributed.processes import world_size

MANIFEST = "manifest.json"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at ``target`` whole or not at all; an existing one is replaced."""
    folder = begin_folder(target)
    try:
        with naming(folder):
            yield folder
        finish_folder(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def begin_folder(target: Path) -> Path:
    """A new folder beside ``target``; what killed processes of this machine left there is
    removed."""
    make_folder(target.parent)
    remove_leftovers(target.parent)
    folder = target.parent / f".tmp-{os.getpid()}"
    folder.mkdir()
    return folder


def finish_folder(folder: Path, target: Path) -> None:
    """Make it durable, then rename it to ``target``.

    A folder that is there is replaced; a file or link is nothing of ours, and set aside.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600
        sync(path)
    old = None
    if is_folder(target):
        old = unfinished(target)
        target.rename(old)
    elif os.path.lexists(target):
        aside = _unused(target)
        target.rename(aside)
        print(f"{target} was a file or link, not a folder of this run: it is now {aside}")
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
    """List every file with size and sha256; must come after all of them are written.

    known: what `described` said of files in it, which are not read again.
    """
    files = dict(known or {})
    for name in _names(folder):
        if name not in files:
            files[name] = described(folder / name)
    manifest = {**facts, "world_size": world_size(), "files": files}
    manifest["sha256"] = _own_digest(manifest)
    (folder / MANIFEST).write_text(_text(manifest), encoding="utf-8")


def described(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify(folder: Path, parts: Sequence[str] = ()) -> str | None:
    """What is wrong with a folder that has a manifest, or None. Raises nothing.

    parts: how names begin of which there must be a file each; with them, what the manifest does
    not list must not be there either, hidden files apart: it might be read in a listed one's place.
    """
    try:
        return _fault(folder, parts)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)


def _fault(folder: Path, parts: Sequence[str]) -> str | None:
    if not is_folder(folder):
        return "it is a file or a link, not a folder"
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        manifest = json.loads(text)
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or _text(manifest) != text:
        return f"{MANIFEST} is not as it was written"
    # Manifests of earlier checkpoints have no digest of themselves.
    own = manifest.pop("sha256", None)
    if not manifest.keys() <= {"step", "world_size", "files"}:
        return f"{MANIFEST} has {sorted(manifest)}"
    if own is not None and own != _own_digest(manifest):
        return f"{MANIFEST} is not as it was written"
    if parts and "step" not in manifest:
        return f"{MANIFEST} has no step"
    if "step" in manifest and folder.name != f"step-{manifest['step']:08d}":
        return f"{MANIFEST} says step {manifest['step']}"
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST} lists no files"
    for part in parts:
        if not any(name.startswith(part) for name in files):
            return f"{MANIFEST} lists no {part}"
    for name, facts in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            return f"{MANIFEST} lists {name}, outside the folder"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
            return f"{name} is not the file that was saved"
        if described(path) != facts:
            return f"{name} is not the file that was saved"
    if parts and (others := [name for name in _names(folder) if name not in files]):
        return f"{others[0]} was not saved with it; move it elsewhere"
    return None


def _names(folder: Path) -> list[str]:
    """Files in a folder and those below it, the manifest and hidden ones apart."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(
        path.as_posix()
        for path in found
        if path != Path(MANIFEST) and not any(part.startswith(".") for part in path.parts)
    )


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(manifest).encode()).hexdigest()


def _unused(path: Path) -> Path:
    """A name beside ``path`` that nothing has."""
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
