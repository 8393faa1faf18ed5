"""Checkpoints are found, pruned, and come back bit for bit; what fails leaves what was there."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from saved import flip, write

from kepo.disk import durable
from kepo.errors import KepoCheckpointError
from kepo.run import checkpoint, optimizer_state
from kepo.run.checkpoint import latest_checkpoint, save_checkpoint
from kepo.run.manifest import new_folder, verify, write_manifest
from kepo.run.optimizer_state import load_optimizer


def test_the_newest_is_found_and_old_ones_pruned(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert latest_checkpoint(tmp_path).name == "step-00000010"


def test_a_damaged_later_step_does_not_push_out_the_good_ones(tmp_path):
    """The run was resumed from before it: what it saves then is the newest."""
    write(tmp_path, 1, keep=1)
    flip(write(tmp_path, 9, keep=2)[0])
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    write(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_rows_come_back_from_as_many_files_as_saved_them(tmp_path, monkeypatch):
    """Seven rows, saved by three processes as FSDP2 cuts them, taken whole and by two others."""
    whole = torch.arange(14.0).reshape(7, 2)
    cuts = (slice(0, 3), slice(3, 6), slice(6, 7))
    for number, rows in enumerate(cuts, 1):
        tensors = {"exp_avg/w": whole[rows].contiguous(), "step/w": torch.tensor(4.0)}
        save_file(tensors, tmp_path / f"optimizer-{number:05d}-of-00003.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(7, 2))
    optimizer = torch.optim.AdamW([parameter])
    load_optimizer(tmp_path, {"w": parameter}, optimizer)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], whole)
    assert optimizer.state[parameter]["step"] == 4
    for rows in (slice(0, 4), slice(4, 7), slice(7, 7)):
        monkeypatch.setattr(optimizer_state, "rows_of", lambda _, rows=rows: rows)
        load_optimizer(tmp_path, {"w": parameter}, optimizer)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], whole[rows])
    with pytest.raises(KepoCheckpointError, match=r"shape \[7, 2\].*another model"):
        load_optimizer(tmp_path, {"w": torch.nn.Parameter(torch.zeros(8, 2))}, optimizer)
    with pytest.raises(KepoCheckpointError, match="has no optimizer"):
        load_optimizer(tmp_path / "none", {"w": parameter}, optimizer)


def test_optimizer_comes_back_bit_for_bit(tmp_path):
    folder, names, optimizer = write(tmp_path, 1)
    fresh = torch.optim.AdamW(names.values(), lr=0.1)
    load_optimizer(folder, names, fresh)
    for parameter in names.values():
        before, after = optimizer.state[parameter], fresh.state[parameter]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_optimizer_of_another_model_is_refused(tmp_path):
    folder, _, _ = write(tmp_path, 1)
    other = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(KepoCheckpointError, match="bias"):
        load_optimizer(
            folder, dict(other.named_parameters()), torch.optim.AdamW(other.parameters())
        )


def test_only_what_the_run_wrote_is_removed_or_read(tmp_path, capsys):
    """Copies, links, folders of other names and of running processes stay, and are not read."""
    folder, _, _ = write(tmp_path, 3)
    mine = tmp_path / "mine"
    for copy in ("step-00000003-keep", "step-3", "step-000000009", "best", ".tmp-keep"):
        shutil.copytree(folder, tmp_path / copy)
    shutil.copytree(folder, mine)
    (tmp_path / "step-00000001").symlink_to("mine")
    (tmp_path / "step-00000002").write_text("notes")
    (tmp_path / ".tmp-1").mkdir()  # there is always a process 1
    kept = sorted(path.name for path in tmp_path.iterdir() if path != folder)
    for step in (4, 5, 6):
        write(tmp_path, step, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*kept, "step-00000005", "step-00000006"])
    assert len(list(mine.rglob("*.safetensors"))) == 2
    assert latest_checkpoint(tmp_path).name == "step-00000006"
    write(tmp_path, 2)  # where a file of somebody else is
    assert (tmp_path / "step-00000002.aside-1").read_text() == "notes"
    assert "it is now" in capsys.readouterr().out


def test_links_alone_are_no_fresh_start(tmp_path):
    folder, _, _ = write(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folder.name).symlink_to(folder)
    with pytest.raises(KepoCheckpointError, match="none of its 1 checkpoints verifies"):
        latest_checkpoint(tmp_path / "run")


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path, 1)

    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, full, {}, torch.optim.AdamW([torch.zeros(1)]), {}, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True)
    for process in (int(ended.stdout), os.getpid()):  # numbers come again, as in a container
        (tmp_path / f".tmp-{process}").mkdir()
        (tmp_path / f".tmp-{process}" / "half").write_text("x")
    write(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_files_are_readable_by_others_and_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))
    )
    folder, _, _ = write(tmp_path, 1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert any(name.endswith(f"/{path.relative_to(folder)}") for name in synced)
    assert synced[-1] == str(tmp_path)


def test_what_the_disk_says_through_other_libraries_is_an_error_of_the_disk(tmp_path):
    """safetensors raises its own; a run on a full disk must still end in a sentence."""

    def full(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    with pytest.raises(OSError, match=r"No space left on device.*/step-00000002'$"):
        save_checkpoint(tmp_path, 2, full, {}, torch.optim.AdamW([torch.zeros(1)]), {}, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_leaves_no_half_checkpoint(tmp_path):
    """The limit on file sizes stops safetensors itself, in the middle of its writing."""
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*/step-00000002'$"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_an_error_of_another_process_is_raised_in_this_one(tmp_path, monkeypatch):
    """Else it would wait for the one that left."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard 2")
    monkeypatch.setattr(checkpoint, "all_gather", lambda mine: [mine, full])
    with pytest.raises(OSError, match="shard 2"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_sync_folders_is_no_reason_to_stop(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write(tmp_path, 1)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        durable.sync(tmp_path)


def test_new_folder_replaces_and_verifies(tmp_path):
    for text in ("a", "b"):
        with new_folder(tmp_path / "x") as folder:
            (folder / "f").write_text(text)
            write_manifest(folder)
    assert (tmp_path / "x" / "f").read_text() == "b" and verify(tmp_path / "x") is None
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["files"]["f"]["bytes"] == 1
