"""Digests of a run's inputs, by which a resumed run knows that it goes on with the same ones.

The inputs are the teacher's files, the student's where its weights are still needed, the files of
rewards and task that are the user's, and the questions with their answers and pictures. A
checkpoint's state.json keeps the digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kepo.data.example import Example
from kepo.data.network import look_for_hub
from kepo.errors import KepoCheckpointError, KepoDataError
from kepo.named import source_of
from kepo.sections import DataConfig

READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""The endings of the files that belong to a model."""
SHORT = 8
"""The hex digits that are kept of a record's digest: enough to name a record, not to prove it."""
READERS = 8
BLOCK = 2**22


def model_files(name: str) -> list[Path] | str:
    """Return the sorted files of a model's folder; for a name on the Hub, the revision in use.

    Empty if there is no such model: whoever reads the model reports that.
    """
    folder = Path(name)
    if folder.is_dir():
        files = (file for file in folder.iterdir() if file.suffix in READ and file.is_file())
        return sorted(file for file in files if not file.name.startswith("."))
    from transformers.utils import cached_file

    look_for_hub(name)
    try:
        config = cached_file(name, "config.json")
    except (OSError, ValueError):
        return []
    return f"revision {Path(config).parent.name}"


def is_weights(file: Path) -> bool:
    """Return whether the file is a part of the weights, or the index of the parts."""
    return ".safetensors" in file.name


def model_identity(name: str) -> dict[str, str]:
    """Return the SHA-256 of all bytes of each of a model's files, by file name; for a name on the
    Hub, its revision.

    Several files are read at once, with a progress bar if it takes long.
    """
    files = model_files(name)
    if isinstance(files, str):
        return {files: "on the Hub"}
    total = sum(file.stat().st_size for file in files)
    ended = threading.Event()

    def read(count: int) -> None:
        if ended.is_set():
            raise InterruptedError("digest of weights")
        bar.update(count)

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="digest of weights", delay=2) as bar,
        ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool,
    ):
        try:
            digests = list(pool.map(lambda file: sha256(file, read), files))
        except BaseException:  # a second signal: do not wait for the other files
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def sha256(file: Path, read: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file's bytes; ``read`` is called with the size of every block."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
            if read is not None:
                read(len(block))
    return digest.hexdigest()


def records_identity(
    examples: Sequence[Example], pictures: Mapping[Path, str | KepoDataError] | None
) -> dict[str, Any]:
    """Return digests of the questions in their order: one of all, and a short one of each.

    pictures: digests of the images' contents; None = images are told apart by path and size.
    """

    def picture(path: Path) -> str:
        if pictures is not None:
            return str(pictures[path])
        return f"{path}, {path.stat().st_size} bytes"

    each = []
    whole = hashlib.sha256()
    for e in examples:
        facts: list[Any] = [e.id, e.question, e.options, e.answer]
        facts += [e.rationale, e.modality, e.question_type]
        if e.earlier or e.columns:  # what has neither keeps the digest it had before there were any
            facts += [e.earlier, {name: repr(value) for name, value in sorted(e.columns.items())}]
        text = json.dumps([facts, [picture(path) for path in e.images]])
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole.update(digest.encode())
        each.append(digest[:SHORT])
    return {"questions": len(examples), "sha256": whole.hexdigest(), "each": "".join(each)}


def code_identity(code: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the files of the user's own code, by setting and the file's name there;
    a setting that names none is left out."""
    found: dict[str, dict[str, str]] = {}
    for setting, names in code.items():
        for name in names:
            if (file := source_of(name)) is not None:
                found.setdefault(setting, {})[name.rpartition(":")[0]] = sha256(file)
    return found


def inputs_of(
    models: Mapping[str, str],
    records: Mapping[str, Any],
    code: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return what a resumed run must find unchanged, by setting: ``records``, and the contents of
    ``models`` and of the files of ``code``."""
    read = {name: model_identity(path) for name, path in models.items()}
    return {**records, **read, **code_identity(code or {})}


def changed_questions(
    config: DataConfig,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    examples: Mapping[str, Sequence[Example]],
) -> set[str]:
    """Return the ids of training questions that changed since the run was last saved.

    state: the checkpoint's state. now: the present inputs, as `inputs_of` gives them. examples: the
    present questions, by setting. Raises KepoDataError if questions differ and KepoCheckpointError
    if a model does, each named, unless ``changed_inputs`` accepts them; then it says what differs.
    """
    before = state.get("inputs")
    if before is None:
        print(
            "the checkpoint has no digests of teacher and questions (it was saved by an earlier "
            "version): they are taken to be those the run began with"
        )
        return set()
    if state["config"]["eval_limit"] != config.eval_limit:  # other questions were asked for
        before = {name: facts for name, facts in before.items() if name != "eval_data"}
    found, ids = other_inputs(before, now, examples)
    text = "; ".join(f"{name} {what}" for name, what in found.items())
    if found and config.changed_inputs == "refuse":
        kind = KepoDataError if found.keys() & examples.keys() else KepoCheckpointError
        raise kind(
            f"changed_inputs: {text}. Bring them back, use another run_dir, or set changed_inputs: "
            "accept to go on with what is here now"
        )
    if found:
        print(f"changed_inputs: accept: {text}")
    return ids


def other_inputs(
    before: Mapping[str, Any], now: Mapping[str, Any], examples: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, str], set[str]]:
    """Return ``(what differs, by setting; ids of training questions that changed)``.

    A setting that only one of ``before`` and ``now`` has is not compared.
    """
    found: dict[str, str] = {}
    ids: set[str] = set()
    for name in sorted(now.keys() & before.keys()):
        if before[name] == now[name]:
            continue
        if name not in examples:
            found[name] = _files(before[name], now[name])
            continue
        known = set(_each(before[name]))
        pairs = zip(examples[name], _each(now[name]), strict=True)
        other = [example.id for example, digest in pairs if digest not in known]
        found[name] = _questions(before[name], now[name], other)
        if name == "train_data":
            ids = set(other)
    return found, ids


def _each(records: Mapping[str, Any]) -> list[str]:
    text = records["each"]
    return [text[start : start + SHORT] for start in range(0, len(text), SHORT)]


def _files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = sorted(before.keys() | now.keys())
    other = [name for name in names if before.get(name) != now.get(name)]
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    return f"has other files than the run began with: {', '.join(other[:3])}{more}"


def _questions(before: Mapping[str, Any], now: Mapping[str, Any], other: Sequence[str]) -> str:
    """Return in words how the questions differ."""
    had, has = before["questions"], now["questions"]
    if had == has and not other:
        return f"has the {has} questions that the run began with in another order"
    counts = f"has {has} usable questions where the run began with {had}"
    if not other:
        return counts
    first = f"the first is {other[0]!r}"
    changed = f"{len(other)} of them are new, or have another text, answer or image: {first}"
    if had != has:
        return f"{counts}; {changed}"
    if len(other) == 1:
        return (
            f"has a question that is new, or whose text, answer or image is not as it was when the "
            f"run began: {other[0]!r}"
        )
    return (
        f"has {len(other)} questions (of {has}) that are new, or whose text, answer or image is "
        f"not as it was when the run began: {first}"
    )
