"""A disk that refuses a call, whichever: one sentence, nothing half, and the run goes on later."""

import errno
import os
from contextlib import nullcontext

import pytest
import toy_run
from faulty_disk import failing, unreadable, watched

from kepo.disk import durable
from kepo.run import checkpoint
from kepo.run.checkpoint import PARTS, latest_checkpoint
from kepo.run.manifest import verify

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Data, what the whole run of five steps ends with, and the run folder at its second step."""
    root = tmp_path_factory.mktemp("known")
    data = toy_run.write_dataset(root / "data")
    with toy_run.toys():
        right = toy_run.undisturbed(data, root / "whole")
        assert toy_run.run(toy_run.config_of(data, root / "run", steps=2)).sentence is None
    return data, right, root / "run"


def calls_of(known, folder) -> list[str]:
    """By which a run from nothing, and one that goes on, change files."""
    data, _, begun = known
    found = []
    for run_dir in (folder / "new", toy_run.copied(begun, folder / "old")):
        calls = []
        with watched(folder, lambda call, path, calls=calls: calls.append(call)):
            toy_run.run(toy_run.config_of(data, run_dir))
        found.append(len(calls))
    return found


def refuse(known, run_dir, number: int, code: int, *, for_ever: bool, begun: bool) -> str:
    """What came of a run whose disk refused that call: in one word, and else a fault."""
    data, right, base = known
    if begun:
        toy_run.copied(base, run_dir)
    run_dir.parent.mkdir(exist_ok=True)
    config = toy_run.config_of(data, run_dir)
    with watched(run_dir, failing(number, code, for_ever=for_ever)):
        ended = toy_run.run(config)
    if ended.sentence is not None:
        if os.strerror(code) not in ended.sentence or str(run_dir) not in ended.sentence:
            return f"what failed and where is not said: {ended.sentence}"
        checkpoints = run_dir / "checkpoints"
        for folder in checkpoints.iterdir() if checkpoints.exists() else ():
            half = verify(folder, PARTS)
            leaving = for_ever or "-step-" in folder.name  # the next save removes it
            if half is not None and not (leaving and folder.name.startswith(".tmp-")):
                return f"{folder.name} is half: {half}"
        if begun and latest_checkpoint(checkpoints) is None:
            return "the older checkpoints are gone"
        again = toy_run.run(config)  # the disk is mended
        if again.sentence is not None:
            return f"does not go on: {again.sentence}"
    if right.wrong_weights(run_dir) or not right.has_logs_of(run_dir):
        return "not what the undisturbed run ends with"
    return "went on" if ended.sentence is None else "sentence"


def refusals(known, root, count: int):
    """``count`` calls, spread evenly over those of a new run and of one that goes on."""
    found, faults = {}, []
    with toy_run.toys():
        lengths = calls_of(known, root / "counted")
        for place in range(count):
            begun = place % 2 == 1
            code, for_ever = CODES[place % 3], place % 4 < 2
            number = 1 + (place * lengths[begun] // count)
            run_dir = root / f"trial-{place}" / "run"
            try:
                kind = refuse(known, run_dir, number, code, for_ever=for_ever, begun=begun)
            except Exception as error:
                kind = f"crash: {error!r}"
            if kind not in ("sentence", "went on"):
                faults.append(f"{place}: call {number}, {errno.errorcode[code]}: {kind}")
                kind = "fault"
            found[kind] = found.get(kind, 0) + 1
    return found, faults


def test_some_write_errors(known, tmp_path):
    found, faults = refusals(known, tmp_path, 6)
    assert not faults and found["sentence"] >= 4, (found, faults)


@pytest.mark.slow
def test_180_write_errors(known, tmp_path, capsys):
    found, faults = refusals(known, tmp_path, 180)
    with capsys.disabled():
        print(f"\nwrite errors: {sum(found.values())} trials, {found}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_errors_that_name_no_file_would_be_seen(known, tmp_path, monkeypatch):
    """As write and sync raise them."""
    for module in (durable, checkpoint):
        monkeypatch.setattr(module, "naming", lambda *_: nullcontext())
    _, faults = refusals(known, tmp_path, 24)
    assert any("is not said" in fault for fault in faults), faults


# ---- reading ----


def readings(known, root, count: int):
    """A run that goes on, with one file of it unreadable: each in turn, and each call in turn."""
    data, right, base = known
    found, faults = {}, []
    with toy_run.toys():
        run_dir = toy_run.copied(base, root / "run")
        reads = []
        with watched(run_dir, on_read=lambda call, path: reads.append((call, path))):
            toy_run.run(toy_run.config_of(data, run_dir))
        files = sorted((path for path in base.rglob("*") if path.is_file()), reverse=True)
        for place in range(count):
            toy_run.copied(base, run_dir)
            if place < len(files):
                on_read = unreadable(str(run_dir / files[place].relative_to(base)))
            else:
                number = (place - len(files)) * len(reads) // max(1, count - len(files))
                on_read = failing(1 + number, errno.EIO, for_ever=False)
            try:
                with watched(run_dir, on_read=on_read):
                    ended = toy_run.run(toy_run.config_of(data, run_dir))
                kind = judged(ended, right, run_dir)
            except Exception as error:
                kind = f"crash: {error!r}"
            if kind not in ("sentence", "fell back", "went on"):
                faults.append(f"{place}: {kind}")
                kind = "fault"
            found[kind] = found.get(kind, 0) + 1
    return found, faults


def judged(ended, right, run_dir) -> str:
    if ended.sentence is not None:
        return "sentence" if "Input/output error" in ended.sentence else ended.sentence
    if right.wrong_weights(run_dir) or not right.has_logs_of(run_dir):
        return "not what the undisturbed run ends with"
    return "fell back" if "passed over" in ended.printed else "went on"


def test_some_read_errors(known, tmp_path):
    found, faults = readings(known, tmp_path, 8)
    assert not faults and found["fell back"] >= 3, (found, faults)


@pytest.mark.slow
def test_60_read_errors(known, tmp_path, capsys):
    found, faults = readings(known, tmp_path, 60)
    with capsys.disabled():
        print(f"\nread errors: {sum(found.values())} trials, {found}")
    assert not faults, "\n".join(faults)
    assert found["fell back"] >= 10
