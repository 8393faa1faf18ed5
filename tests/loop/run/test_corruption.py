"""Whatever is done to the files of a run: it goes on to the right bits, or ends in a sentence."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import toy_run
from places import SUPPORT
from safetensors.torch import load_file

from kepo import config
from kepo.run import checkpoint

SAID = ("damaged", "has lost or changed lines")
"""Words by which a run says that something of it was not as it had been."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Data, what the whole run ends with, and the run folder at its fourth step of five."""
    root = tmp_path_factory.mktemp("begun")
    data = toy_run.write_dataset(root / "data")
    with toy_run.toys():
        right = toy_run.undisturbed(data, root / "whole")
        assert toy_run.run(toy_run.config_of(data, root / "run", steps=4)).sentence is None
    return data, right, root / "run"


# ---- what is done ----


def flip(path, files, rng):
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path, files, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, rng.randrange(len(content) + 1)])])


def delete(path, files, rng):
    path.unlink()


def swap(path, files, rng):
    """With another file: of that name in another checkpoint, if there is one."""
    others = [x for x in files if x != path and x.name == path.name] or files
    other = rng.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def zero(path, files, rng):
    content = path.read_bytes()
    start = rng.randrange(len(content) + 1)
    end = rng.randrange(start, len(content) + 1)
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])


def shuffle(path, files, rng):
    content = path.read_bytes()
    cut = rng.randrange(len(content) + 1)
    path.write_bytes(content[cut:] + content[:cut])


def append(path, files, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 50)))


def noise(path, files, rng):
    path.write_bytes(rng.randbytes(rng.randrange(200)))


def a_folder_instead(path, files, rng):
    path.unlink()
    path.mkdir()


def a_file_instead(path, files, rng):
    """For the checkpoint or its policy; another file for one outside."""
    folder = path.parent
    if folder.name == "policy" or folder.name.startswith("step-"):
        shutil.rmtree(folder)
        folder.write_bytes(b"x")
    else:
        noise(path, files, rng)


def another_copy(path, files, rng):
    """A checkpoint, or a part of one, once more under another name or over another one."""
    steps = sorted({path.parent for path in files if path.parent.name.startswith("step-")})
    one, other = rng.sample(steps, 2)
    kind = rng.randrange(4)
    if kind == 0:
        shutil.copytree(one, one.with_name(f"step-{rng.randrange(4, 12):08d}"), dirs_exist_ok=True)
    elif kind == 1:
        shutil.rmtree(other)
        shutil.copytree(one, other)
    elif kind == 2:
        shutil.copytree(one / "policy", other / "policy", dirs_exist_ok=True)
    else:
        shutil.copytree(one / "policy", other / "policy" / "policy")


DONE = [
    *(flip, flip, flip, truncate, delete, swap, zero, shuffle, append, noise),
    *(a_folder_instead, a_file_instead, another_copy),
]


# ---- what comes of it ----


def trial(begun, run_dir, number):
    """What a run does about it, in one word; fails if it is neither right nor a sentence."""
    data, right, base = begun
    rng = random.Random(number)
    toy_run.copied(base, run_dir)
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    # Nobody looks at the older checkpoints while the newest is whole.
    looked_at = [path for path in files if "step-00000004" in str(path) or path.suffix == ".jsonl"]
    path = rng.choice(looked_at if rng.random() < 0.8 else files)
    done = DONE[number % len(DONE)]
    done(path, files, rng)
    try:
        ended = toy_run.run(toy_run.config_of(data, run_dir))
    except Exception as error:
        return "crash", f"{done.__name__} {path.relative_to(run_dir)}: {error!r}"
    if ended.sentence is not None:
        return "sentence", ended.sentence
    said = any(words in ended.printed for words in SAID)
    wrong = right.wrong_weights(run_dir)
    if wrong or not (said or right.has_logs_of(run_dir)):
        return "accepted", f"{done.__name__} {path.relative_to(run_dir)}: {wrong}"
    return ("said and gone on" if said else "no effect"), ""


def trials(begun, run_dir, numbers):
    found = Counter()
    faults = []
    with toy_run.toys():
        for number in numbers:
            kind, what = trial(begun, run_dir, number)
            found[kind] += 1
            if kind in ("crash", "accepted"):
                faults.append(f"{number}: {kind}: {what}")
    return found, faults


def test_some_corruptions(begun, tmp_path):
    found, faults = trials(begun, tmp_path / "run", range(len(DONE)))
    assert not faults and found["said and gone on"] >= 4, found


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """That version ends with the same weights; what has been logged stays as it was."""
    run_dir = earlier(tmp_path, monkeypatch)
    logs = [run_dir / name for name in ("metrics.jsonl", "completions.jsonl")]
    before = [path.read_text() for path in logs]
    with toy_run.toys():
        ended = toy_run.run(EARLIER)
    assert ended.sentence is None and "resuming after step 3" in ended.printed
    assert "no digests of teacher and questions" in ended.printed
    assert not any(words in ended.printed for words in SAID)
    assert all(path.read_text().startswith(x) for path, x in zip(logs, before, strict=True))
    assert {record["step"] for record in toy_run.log(run_dir)} == {0, 1, 2, 3, 4, 5}
    found = toy_run.weights(run_dir)
    right = load_file(OF_B15BCBB / "end" / "model.safetensors")
    right |= load_file(OF_B15BCBB / "end" / "optimizer.safetensors")
    assert found.keys() == right.keys()
    for name, x in right.items():  # another processor rounds a tanh in another way
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6, msg=name)


def earlier(folder, monkeypatch):
    """The recorded run and its data in ``folder``, which is where the process is from now on.

    A version of November made it, with the toy and the settings below, and went on to ``end``. Its
    manifests have no digest of themselves, its states no marks of the logs and no digests of what
    it read, its sampler is called engine, and settings of today are missing.
    """
    monkeypatch.chdir(folder)
    toy_run.write_dataset(Path("data"))
    return toy_run.copied(OF_B15BCBB / "run", Path("run"))


OF_B15BCBB = SUPPORT / "run_of_b15bcbb"
EARLIER = toy_run.config_of(Path("data"), Path("run"), num_iterations=2)


def test_a_record_says_what_it_is_said_to(tmp_path, monkeypatch):
    folder = earlier(tmp_path, monkeypatch) / "checkpoints" / "step-00000003"
    state = json.loads((folder / "state.json").read_text())
    assert state.keys() == {"step", "config", "hints"}
    assert "engine" in state["config"] and "hint_retries" not in state["config"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {"step", "world_size", "files"}


def test_a_setting_renamed_and_forgotten_would_be_seen(tmp_path, monkeypatch):
    earlier(tmp_path, monkeypatch)
    monkeypatch.setattr(config, "RENAMED", {})
    with toy_run.toys():
        ended = toy_run.run(EARLIER)
    assert "step-00000003: unknown keys ['engine']" in ended.sentence


@pytest.mark.slow
def test_800_corruptions(begun, tmp_path, capsys):
    found, faults = trials(begun, tmp_path / "run", range(800))
    with capsys.disabled():
        print(f"\ncorruption: {sum(found.values())} trials, {dict(found)}")
    assert not faults, "\n".join(faults)
    assert sum(found.values()) == 800 and found["said and gone on"] > 300


def test_trusting_the_files_would_be_seen(begun, tmp_path, monkeypatch):
    """Without the checksums the same trials find what is accepted, and what crashes."""
    monkeypatch.setattr(checkpoint, "verify", lambda folder, parts: None)
    _, faults = trials(begun, tmp_path / "run", range(8))
    assert len(faults) >= 2, faults
