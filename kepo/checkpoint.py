"""Checkpoints that are verified or ignored: a run killed at any moment finds its last complete one.

    checkpoints/.tmp-<pid>/   write everything, hash it, write manifest.json, fsync every file
    checkpoints/step-00000050 the same folder, renamed; then fsync the parent and prune

Loading takes the newest step whose files all match the manifest's sha256. If steps exist and none
does, it stops: a silent fresh start would throw the run away. Weights and optimiser are
safetensors, the rest JSON; nothing is pickled. Randomness needs no saving: data order and sampling
of a step are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kepo.errors import KepoCheckpointError
from kepo.optimizer_state import save_optimizer
from kepo.parallel import by_first, is_first, together, world_size

MANIFEST = "manifest.json"


def save_checkpoint(
    root: Path,
    step: int,
    write_policy: Callable[[Path], None],
    named_parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``root/step-<step>``: ``policy/`` (by ``write_policy``), the optimiser, ``state``;
    prune to ``keep``.

    All processes call, and all call ``write_policy``. The first writes all else but the others'
    shares of a sharded optimiser, which each process writes and hashes for itself; the folder must
    be on a disk that all can reach.
    """
    target = root / f"step-{step:08d}"
    folder = by_first(lambda: begin_folder(target))
    try:
        write_policy(folder / "policy")
        own = save_optimizer(folder, named_parameters, optimizer)
        hashes = together({path.name: described(path) for path in own})

        def finish() -> None:
            (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            known = {name: facts for each in hashes for name, facts in each.items()}
            write_manifest(folder, known, step=step)
            finish_folder(folder, target)
            _prune(root, target, keep)

        by_first(finish)
    except BaseException:
        if is_first():  # the others do not know how far it has come
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Prints why newer ones are passed over; KepoCheckpointError if every one is damaged.
    """
    steps = _steps(root)
    for folder in reversed(steps):
        fault = verify(folder)
        if fault is None:
            return folder
        print(f"checkpoint {folder} is damaged and passed over: {fault}")
    if steps:
        raise KepoCheckpointError(
            f"{root}: none of its {len(steps)} checkpoints verifies; restore one, or remove the "
            "folder to start afresh"
        )
    return None


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at ``target`` whole or not at all; an existing one is replaced."""
    folder = begin_folder(target)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finish_folder(folder, target)


def begin_folder(target: Path) -> Path:
    """A new folder beside ``target``; what killed processes left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(".tmp-*"):
        shutil.rmtree(stale)
    folder = target.parent / f".tmp-{os.getpid()}"
    folder.mkdir()
    return folder


def finish_folder(folder: Path, target: Path) -> None:
    """Make it durable, then rename it to ``target``."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600
        _fsync(path)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    _fsync(target.parent)


def write_manifest(
    folder: Path, known: Mapping[str, dict[str, Any]] | None = None, **facts: Any
) -> None:
    """List every file with size and sha256; must come after all of them are written.

    known: what `described` said of files in it, which are not read again.
    """
    files = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in files:
            files[name] = described(path)
    text = json.dumps({**facts, "world_size": world_size(), "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def described(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    if "step" in manifest and folder.name != f"step-{manifest['step']:08d}":
        return f"{MANIFEST} says step {manifest['step']}"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"] or described(path) != facts:
            return f"{name} is not the file that was saved"
    return None


def append_durably(path: Path, line: str) -> None:
    """Append a line and wait until it is on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Leave ``newest`` and as many before it as make ``keep``. Later steps were damaged, or the
    run would have gone on from them."""
    steps = _steps(root)
    place = steps.index(newest)
    for old in [*steps[: max(0, place + 1 - keep)], *steps[place + 1 :]]:
        shutil.rmtree(old)


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
