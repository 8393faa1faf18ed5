"""The ranks of a run compare, before they train, what each has by itself: settings, the code
and the user's own, the files of models that every rank reads, and on other nodes the images. What
rank 0 reads for all is not compared: records, and weights that the other ranks receive."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kepo.config import Config
from kepo.data.identity import code_identity, is_weights, model_files, sha256
from kepo.data.run_data import RunData
from kepo.distributed.processes import (
    all_gather,
    errors_end_all_ranks,
    is_rank0,
    processes,
    ranks,
    world_size,
)
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.device import known_device

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "peft")
NAMED = 8
"""The most differences that the error names; it counts the others."""
SAMPLED = 64
"""The number of images of which another node's bytes are compared too, not the sizes alone."""
BLOCK = 2**16


@contextmanager
def agreeing_ranks(
    config: Config, code: Mapping[str, Sequence[str]] | None = None
) -> Iterator[torch.device]:
    """Join the ranks of this run and check that settings, code and models are the same on all of
    them; yields this rank's device. Raises KepoConfigError on all ranks otherwise.

    code: the user's own code that is named, by setting (`Environment.code`).
    """
    shards = config.sharding == "fsdp2" or config.teacher_placement != "copy"
    timeout = config.rank_timeout_minutes * 60
    with errors_end_all_ranks():
        wanted = known_device(config.device)
    with processes(str(wanted), alone=shards, timeout=timeout) as device:
        if world_size() > 1:
            refuse_different("devices", {"device": device.type})
            refuse_different("settings", dataclasses.asdict(config))
            refuse_different("installed code", software())
            own = code_identity(code or {}).values()
            refuse_different(
                "files of rewards and task", {k: v for each in own for k, v in each.items()}
            )
            models = {"student": config.student, **config.local_teachers}
            bits = dict.fromkeys(models, config.teacher_bits) | {"student": config.student_bits}
            whole = {role for role, each in bits.items() if each is not None}
            refuse_different("files of models", read_by_each(models, whole))
        yield device


def refuse_different(what: str, mine: Mapping[str, object]) -> None:
    """Raise KepoConfigError on every rank if one has another value than rank 0 under any name; the
    error says which names, and whose values. All ranks call."""
    everyones = all_gather({name: repr(value) for name, value in mine.items()})
    names = dict.fromkeys(name for each in everyones for name in each)
    found = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for place, each in enumerate(everyones):
            holders.setdefault(each.get(name, "nothing"), []).append(place)
        if len(holders) > 1:
            whose = (f"{value} on {ranks(places)}" for value, places in holders.items())
            found.append(f"{name}: {', '.join(whose)}")
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise KepoConfigError(
            f"ranks differ in {what}: {'; '.join(found[:NAMED])}{more}; start "
            "all of them with the same"
        )


def software() -> dict[str, str]:
    """Return the versions of the packages that compute, the environment settings that affect them,
    and a digest of this package's own source."""
    found = {"python": platform.python_version()}
    found["KEPO_CPU_ISA"] = os.environ.get("KEPO_CPU_ISA", "not set")
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    here = Path(__file__).parents[1]
    for package in (here, here.with_name("kepo_kernels")):
        digest = hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
        found[f"source of {package.name}"] = digest.hexdigest()[:12]
    return found


def read_by_each(models: Mapping[str, str | None], whole: Collection[str] = ()) -> dict[str, str]:
    """Return short digests of the files of ``models``, by role, that every rank reads by itself.

    whole: the roles whose weights every rank reads too, as those of quantised models. They are
    compared by size, header and samples: to read all of them would take as long as loading them.
    """
    found = {}
    for role, name in models.items():
        if name is None:
            continue
        files = model_files(name)
        if isinstance(files, str):
            found[role] = files
            continue
        for file in files:
            if role in whole or not is_weights(file):
                digest = sampled if is_weights(file) else sha256
                try:
                    found[f"{role}/{file.name}"] = digest(file)[:12]
                except OSError as error:
                    found[f"{role}/{file.name}"] = f"unreadable: {error.strerror}"
    return found


def sampled(file: Path) -> str:
    """Return the SHA-256 of a file's size, its first blocks (where safetensors has its table), and
    fifteen others."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        digest.update(content.read(16 * BLOCK))
        for part in range(1, 16):
            content.seek(max(0, size * part // 15 - BLOCK))
            digest.update(content.read(BLOCK))
    return digest.hexdigest()


def same_images(data: RunData) -> None:
    """Raise KepoDataError on every rank if an image file is missing or different on another node.

    The first rank of each node compares all sizes, and the bytes of ``SAMPLED`` images. All ranks
    call, with the same data.
    """
    if world_size() == 1:
        return
    shown = [path for e in [*data.train, *data.eval] for path in e.images]
    paths = list(dict.fromkeys(shown))
    looks = is_rank0() or os.environ.get("LOCAL_RANK", "0") == "0"
    everyones = all_gather((socket.gethostname(), _seen(paths) if looks else None))
    _, expected = everyones[0]
    assert expected is not None, "rank 0 looks at the images"
    for place, (host, seen) in enumerate(everyones):
        pairs = zip(paths, expected, seen or expected, strict=True)
        other = [path for path, mine, theirs in pairs if mine != theirs]
        if other:
            raise KepoDataError(
                f"rank {place}, on {host}: {len(other)} of {len(paths)} images are missing or "
                f"other than for rank 0, first {other[0]}; every node needs the same files"
            )


def _seen(paths: Sequence[Path]) -> list[str]:
    """Return the size of each image, and for some of them a digest of the contents."""
    every = max(1, len(paths) // SAMPLED)

    def look(place: int) -> str:
        try:
            size = paths[place].stat().st_size
            return sha256(paths[place])[:12] if place % every == 0 else str(size)
        except OSError as error:
            return f"missing: {error.strerror}"

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(look, range(len(paths))))
