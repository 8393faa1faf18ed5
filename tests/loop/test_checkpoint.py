"""A checkpoint verifies or is passed over, whatever happened to its files."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from kepo import checkpoint, optimizer_state
from kepo.checkpoint import latest_checkpoint, new_folder, save_checkpoint, verify
from kepo.errors import KepoCheckpointError
from kepo.optimizer_state import load_optimizer


def write(root, step, keep=3):
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()

    def policy(folder):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")

    names = dict(model.named_parameters())
    return (
        save_checkpoint(root, step, policy, names, optimizer, {"step": step}, keep),
        names,
        optimizer,
    )


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


def flip(folder):
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(folder):
    os.truncate(folder / "policy" / "model.safetensors", 20)


def empty(folder):
    (folder / "state.json").write_text("")


def delete(folder):
    (folder / "policy" / "model.safetensors").unlink()


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-30])


def swapped(folder):
    other = folder.parent / "step-00000001"
    shutil.copy(other / "policy" / "model.safetensors", folder / "policy")


def renamed_from_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


DAMAGE = [
    flip,
    truncate,
    empty,
    delete,
    no_manifest,
    cut_manifest,
    swapped,
    renamed_from_another_step,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    write(tmp_path, 1)
    damage(write(tmp_path, 2)[0])
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert "step-00000002 is damaged" in capsys.readouterr().out


def test_when_none_verifies_it_stops_instead_of_starting_afresh(tmp_path):
    flip(write(tmp_path, 1)[0])
    flip(write(tmp_path, 2)[0])
    with pytest.raises(KepoCheckpointError, match="none of its 2 checkpoints verifies"):
        latest_checkpoint(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path, 1)

    def full(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, full, {}, torch.optim.AdamW([torch.zeros(1)]), {}, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".tmp-1").mkdir()
    (tmp_path / ".tmp-1" / "half").write_text("x")
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


def test_new_folder_replaces_and_verifies(tmp_path):
    for text in ("a", "b"):
        with new_folder(tmp_path / "x") as folder:
            (folder / "f").write_text(text)
            checkpoint.write_manifest(folder)
    assert (tmp_path / "x" / "f").read_text() == "b" and verify(tmp_path / "x") is None
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["files"]["f"]["bytes"] == 1
