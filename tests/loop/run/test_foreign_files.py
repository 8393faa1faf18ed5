"""What somebody else put among the checkpoints: never removed, never read, no reason to stop."""

import json
import os
import shutil

import pytest
import torch
import toy_run
from safetensors.torch import load_file, save_file
from saved import flip, write

from kepo.run.checkpoint import PARTS, latest_checkpoint
from kepo.run.manifest import as_saved, verify
from kepo.run.metrics import read_metrics
from kepo.run.optimizer_state import load_optimizer

EXTRA = (
    "merged/model.gguf",
    "policy/notes.txt",
    "notes",
    ".hidden/mine",
    "optimizer-00002-of-00002.safetensors",
    "policy/model.safetensors.index.json",
    "policy/model-00002-of-00002.safetensors",
)


def put(folder, name, text="mine"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def kept(root, name):
    """What is left of a file of that name, below any folder."""
    return [path.read_text() for path in root.rglob(name.rsplit("/", 1)[-1]) if path.is_file()]


@pytest.mark.parametrize("name", EXTRA)
def test_a_checkpoint_with_somebody_elses_file_is_used_and_never_removed(tmp_path, name, capsys):
    write(tmp_path, 1)
    folder, names, optimizer = write(tmp_path, 2)
    put(folder, name)
    assert latest_checkpoint(tmp_path) == folder and verify(folder, PARTS) is None
    assert (
        f"files that were not saved with it: {name}; they are not read" in capsys.readouterr().out
    )
    seen = as_saved(folder)
    read = {path.relative_to(seen).as_posix() for path in seen.rglob("*") if path.is_file()}
    assert read == {
        "manifest.json",
        "state.json",
        "optimizer.safetensors",
        "policy/model.safetensors",
    }
    again = torch.optim.AdamW(names.values(), lr=0.1)
    load_optimizer(seen, names, again)
    for parameter in names.values():
        mine, theirs = (one.state[parameter]["exp_avg"] for one in (again, optimizer))
        assert torch.equal(mine, theirs)
    write(tmp_path, 2)  # that step once more, in its place
    assert verify(folder, PARTS) is None and not (folder / name).exists()
    assert kept(tmp_path, name) == ["mine"]
    aside = tmp_path / "step-00000002.aside-1"
    assert (aside / name).read_text() == "mine" and (aside / "state.json").is_file()
    assert f"it is now {aside}" in capsys.readouterr().out
    put(folder, name, "mine too")
    for step in (3, 4, 5):
        write(tmp_path, step, keep=2)  # by now it is one too many
    assert sorted(kept(tmp_path, name)) == ["mine", "mine too"]
    left = [path.name for path in tmp_path.iterdir() if "aside" not in path.name]
    assert sorted(left) == ["step-00000004", "step-00000005"]


def test_links_are_files_of_somebody_else_too(tmp_path):
    """A link to a folder looks like one, and what it leads to is not ours either."""
    folder, _, _ = write(tmp_path / "run", 1)
    put(tmp_path, "elsewhere/mine")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "gone").symlink_to("nowhere")
    write(tmp_path / "run", 1)
    aside = tmp_path / "run" / "step-00000001.aside-1"
    assert os.readlink(aside / "gone") == "nowhere"
    assert (aside / "linked" / "mine").read_text() == "mine"


def test_what_systems_leave_is_nobodys(tmp_path, capsys):
    folder, _, _ = write(tmp_path, 1)
    for name in (".DS_Store", "policy/._model", "__MACOSX/x", ".cache/huggingface/x", ".nfs00012"):
        put(folder, name)
    assert latest_checkpoint(tmp_path) == as_saved(folder) == folder
    write(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert capsys.readouterr().out == ""


def test_folders_that_are_no_checkpoints_of_the_run_are_set_aside(tmp_path, capsys):
    """Notes under a later step; a copy under the name of another; and they take nobody's place."""
    write(tmp_path, 1, keep=2)
    folder, _, _ = write(tmp_path, 2, keep=2)
    put(tmp_path, "step-00000077/notes.txt")
    shutil.copytree(folder, tmp_path / "step-00000090")
    (tmp_path / "step-00000000").mkdir()
    assert latest_checkpoint(tmp_path) == folder
    write(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000000.aside-1",
        "step-00000002",
        "step-00000003",
        "step-00000077.aside-1",
        "step-00000090.aside-1",
    ]
    assert kept(tmp_path, "notes.txt") == ["mine"]
    said = capsys.readouterr().out
    assert "step-00000077 is not the run's own (it has no manifest.json)" in said
    assert "step-00000090 is not the run's own (manifest.json says step 2)" in said


def test_a_damaged_checkpoint_of_the_run_is_still_replaced(tmp_path):
    write(tmp_path, 1)
    flip(write(tmp_path, 2)[0])
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A dataset, a run of three steps on it, and what five steps end with."""
    root = tmp_path_factory.mktemp("toy")
    data = toy_run.write_dataset(root / "data")
    with toy_run.toys():
        whole = toy_run.undisturbed(data, root / "whole")
        assert toy_run.run(toy_run.config_of(data, root / "begun", steps=3)).sentence is None
    return data, root / "begun", whole


def test_a_run_goes_on_from_its_own_files_to_the_same_bits(right, tmp_path):
    """A second shard of the optimiser, and weights that transformers would take first."""
    data, begun, whole = right
    run_dir = toy_run.copied(begun, tmp_path / "run")
    folder = run_dir / "checkpoints" / "step-00000003"
    other = {name: x + 1 for name, x in load_file(folder / "optimizer.safetensors").items()}
    save_file(other, folder / "optimizer-00002-of-00002.safetensors")
    put(folder, "policy/model.safetensors.index.json", json.dumps({"weight_map": {}}))
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, run_dir))
    assert ended.sentence is None and f"resuming after step 3 from {folder}" in ended.printed
    assert whole.wrong_weights(run_dir) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "completions.jsonl", "data.json", "curves.png", "lock"]
)
def test_what_is_no_file_in_the_place_of_one_is_said_before_anything(right, tmp_path, name, kind):
    data, begun, _ = right
    run_dir = toy_run.copied(begun, tmp_path / "run")
    place = run_dir / name
    place.unlink()
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, run_dir))
    assert ended.printed == "" and "\n" not in ended.sentence
    assert f"{place}: it is a " in ended.sentence and "move it away" in ended.sentence


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest", "state"])
def test_reading_a_run_waits_for_no_pipe(tmp_path, name):
    """Where it is not `train` that reads: by themselves too."""
    folder, _, _ = write(tmp_path, 1)
    if name == "metrics.jsonl":
        os.mkfifo(tmp_path / name)
        with pytest.raises(OSError, match=r"metrics\.jsonl: it is a .*; expected a regular file"):
            read_metrics(tmp_path / name)
        return
    (folder / f"{name}.json").unlink()
    os.mkfifo(folder / f"{name}.json")
    assert name in verify(folder, PARTS)
