"""A checkpoint verifies or is passed over, whatever happened to its files."""

import errno
import json
import os
import shutil

import pytest
from saved import flip, write

from kepo.errors import KepoCheckpointError
from kepo.run.checkpoint import PARTS, latest_checkpoint
from kepo.run.manifest import MANIFEST, described, verify, write_manifest


def truncate(folder):
    os.truncate(folder / "policy" / "model.safetensors", 20)


def empty(folder):
    (folder / "state.json").write_text("")


def delete(folder):
    (folder / "policy" / "model.safetensors").unlink()


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-30])


def swapped(folder):
    other = folder.parent / "step-00000001"
    shutil.copy(other / "policy" / "model.safetensors", folder / "policy")


def renamed_from_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


def a_file_in_its_place(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def a_link_in_its_place(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def a_file_for_the_policy(folder):
    shutil.rmtree(folder / "policy")
    (folder / "policy").write_text("")


def a_folder_for_the_state(folder):
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


def a_pipe_for_the_manifest(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def a_folder_for_the_manifest(folder):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def a_pipe_for_the_state(folder):
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


DAMAGE = [
    *(flip, truncate, empty, delete, no_manifest, cut_manifest, swapped),
    *(renamed_from_another_step, a_file_in_its_place, a_link_in_its_place),
    *(a_file_for_the_policy, a_folder_for_the_state, a_pipe_for_the_state),
    *(a_pipe_for_the_manifest, a_folder_for_the_manifest),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    write(tmp_path, 1)
    damage(write(tmp_path, 2)[0])
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert "step-00000002 is damaged" in capsys.readouterr().out
    write(tmp_path, 2)  # the run goes on and saves that step again
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen(tmp_path):
    folder, _, _ = write(tmp_path, 1)
    path = folder / MANIFEST
    whole = path.read_bytes()
    assert verify(folder, PARTS) is None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert verify(folder, PARTS) is not None, place


@pytest.mark.parametrize(
    "manifest",
    [
        *("[]", "null", "[" * 100_000, '{"step": "1", "files": {}}', '{"step": [1], "files": []}'),
        {"step": "1"},
        {"step": -1},
        {"step": None},
        {"files": ["state.json"]},
        {"files": {}},
        {"files": None},
        {"files": {"../../other": {"bytes": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": {"a\0b": {"bytes": 1, "sha256": ""}}},
        {"files": {"state.json": None}},
        {"files": {"state.json": {"bytes": -1, "sha256": ""}}},
        {"files": {"state.json": {"cytes": 1}}},
        {"other": 1},
    ],
)
def test_a_manifest_of_any_kind_is_judged_and_raises_nothing(tmp_path, manifest):
    """Without the digest of itself, as earlier versions wrote it: only its contents tell."""
    folder, _, _ = write(tmp_path, 1)
    path = folder / MANIFEST
    if isinstance(manifest, dict):
        old = earlier_manifest(folder)
        files = manifest.get("files")
        if isinstance(files, dict) and files:
            files = old["files"] | files  # all else is right
        changed = old | manifest | ({} if files is None else {"files": files})
        manifest = json.dumps(changed, indent=1)
    path.write_text(manifest)
    assert verify(folder, PARTS) is not None
    assert verify(folder) is not None


@pytest.mark.parametrize("place", ["../{}", "policy/../../{}", "{root}/{}"])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, place):
    folder, _, _ = write(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    old = earlier_manifest(folder)
    name = place.format("outside", root=tmp_path)
    files = old["files"] | {name: described(tmp_path / "outside")}
    (folder / MANIFEST).write_text(json.dumps(old | {"files": files}, indent=1))
    assert "outside the folder" in verify(folder, PARTS)


def earlier_manifest(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert len(manifest.pop("sha256")) == 64
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def test_a_checkpoint_of_an_earlier_version_verifies(tmp_path):
    folder, _, _ = write(tmp_path, 1)
    earlier_manifest(folder)
    assert latest_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("part", PARTS)
def test_a_manifest_that_lacks_a_part_does_not_verify(tmp_path, part):
    """Nobody could resume from it, however well the other files match."""
    folder, _, _ = write(tmp_path, 1)
    for path in list(folder.rglob("*")):
        if path.relative_to(folder).as_posix().startswith(part) and path.is_file():
            path.unlink()
    write_manifest(folder, step=1)
    assert verify(folder) is None and part in verify(folder, PARTS)


@pytest.mark.parametrize("where", ["open", "stat"])
@pytest.mark.parametrize("name", [MANIFEST, "state.json", "optimizer", "model"])
def test_an_unreadable_sector_is_passed_over(tmp_path, monkeypatch, name, where, capsys):
    write(tmp_path, 1)
    write(tmp_path, 2)
    real = getattr(type(tmp_path), where)

    def unreadable(self, *arguments, **named):
        if "step-00000002/" in str(self) and name in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(type(tmp_path), where, unreadable)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert "Input/output error" in capsys.readouterr().out


def test_when_none_verifies_it_stops_instead_of_starting_afresh(tmp_path):
    flip(write(tmp_path, 1)[0])
    flip(write(tmp_path, 2)[0])
    with pytest.raises(KepoCheckpointError, match="none of its 2 checkpoints verifies"):
        latest_checkpoint(tmp_path)
