"""Checkpoints that are verified or ignored: a run killed at any moment finds its last complete one.

    checkpoints/.tmp-<pid>/   write everything, hash it, write manifest.json, fsync every file
    checkpoints/step-00000050 the same folder, renamed; then fsync the parent and prune

Loading takes the newest step whose files all match the manifest's sha256. If steps exist and none
does, it stops: a silent fresh start would throw the run away. Weights and optimiser are
safetensors, the rest JSON; nothing is pickled. Randomness needs no saving: data order and sampling
of a step are functions of (seed, step). Folders of any other name, links and files are not
checkpoints: they are neither read nor removed. Nor is a file that somebody put into a checkpoint:
the checkpoint is used without it, and set aside where it would be removed or replaced.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from kepo.disk.durable import as_json, is_folder, naming, remove, unfinished
from kepo.distributed.processes import all_gather, is_rank0, on_rank0
from kepo.errors import KepoCheckpointError, KepoError
from kepo.run.manifest import (
    UNREADABLE,
    begin_folder,
    described,
    finish_folder,
    foreign,
    is_described,
    set_aside,
    unlisted,
    verify,
    write_manifest,
)
from kepo.run.optimizer_state import save_optimizer

T = TypeVar("T")

PARTS = ("state.json", "policy/", "optimizer")
"""Prefixes of the file names that every checkpoint has."""


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

    All ranks call, and all call ``write_policy``. Rank 0 writes everything else except the other
    ranks' shares of a sharded optimiser, which each rank writes and hashes itself; the folder must
    be on a disk that all ranks can reach. Raises OSError if that disk cannot take it; older
    checkpoints are then unchanged.
    """
    target = root / f"step-{step:08d}"
    folder = on_rank0(lambda: begin_folder(target))
    try:
        with naming(target, folder):
            hashes = _from_each_rank(
                lambda: _written(folder, write_policy, named_parameters, optimizer)
            )

        def finish() -> None:
            with naming(target, folder):
                (folder / "state.json").write_text(as_json(state, indent=1), encoding="utf-8")
                known = {name: facts for each in hashes for name, facts in each.items()}
                write_manifest(folder, known, step=step)
                finish_folder(folder, target)
            _prune(root, target, keep)

        on_rank0(finish)
    except BaseException:
        if is_rank0():  # the others do not know how far it has come
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def _written(
    folder: Path,
    write_policy: Callable[[Path], None],
    named_parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, dict[str, Any]]:
    """Write this rank's part; return what it wrote of the optimiser, for the manifest."""
    write_policy(folder / "policy")
    own = save_optimizer(folder, named_parameters, optimizer)
    return {path.name: described(path) for path in own}


def _from_each_rank(make: Callable[[], T]) -> list[T]:
    """Call ``make`` on every rank and return the results, by rank; an error on one rank is raised
    on all, as by `on_rank0`."""
    try:
        mine: T | Exception = make()
    except (KepoError, OSError) as error:
        mine = error
    everyones = all_gather(mine)
    for one in everyones:
        if isinstance(one, Exception):
            raise one
    return everyones  # type: ignore[return-value]


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint that verifies; None if there is no checkpoint at all.

    Prints why newer ones are passed over, and which files in it are not the run's. Raises
    KepoCheckpointError if every one is damaged.
    """
    steps = _steps(root)
    for folder in reversed(steps):
        fault, others = verify(folder, PARTS), []
        if fault is None:
            try:
                others = unlisted(folder)
            except UNREADABLE as error:  # a moment ago it could be read
                fault = str(error)
        if fault is None:
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                print(
                    f"{folder} has files that were not saved with it: {others[0]}{more}; they are "
                    "not read, and stay"
                )
            return folder
        print(f"checkpoint {folder} is damaged and passed over: {fault}")
    if steps:
        raise KepoCheckpointError(
            f"{root}: none of its {len(steps)} checkpoints verifies; restore one, or remove the "
            "folder to start afresh"
        )
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """Return the ``state`` that `save_checkpoint` was given, from a folder that verifies."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Keep ``newest`` and as many checkpoints before it as make ``keep``; remove the others. Later
    steps were damaged, or the run would have gone on from them. What is not the run's own is set
    aside: at once if it has no manifest of its step, and is no checkpoint; else when its turn
    comes."""
    folders = [path for path in _steps(root) if is_folder(path)]
    steps = [path for path in folders if path == newest or is_described(path)]
    place = steps.index(newest)
    leave = {*steps[max(0, place + 1 - keep) : place + 1]}
    for old in folders:
        if old in leave:
            continue
        if (why := foreign(old)) is not None:
            with suppress(OSError):
                set_aside(old, why)
            continue
        leaving = unfinished(old)  # killed in the middle of it, no half checkpoint is left
        with suppress(OSError):
            old.rename(leaving)
            old = leaving
        remove(old)


def _steps(root: Path) -> list[Path]:
    """Return every path that has exactly the name of a checkpoint, by step."""
    if not root.exists():
        return []
    found = {}
    for path in root.iterdir():
        name = re.fullmatch(r"step-(\d{8,})", path.name, re.ASCII)
        if name and path.name == f"step-{int(name[1]):08d}":
            found[int(name[1])] = path
    return [found[step] for step in sorted(found)]
