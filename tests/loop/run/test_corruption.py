"""Whatever is done to the files of a run: it goes on to the right bits, or ends in a sentence."""

import json
import random
import shutil
from collections import Counter

import pytest
import toy_run

from kepo.run import checkpoint
from kepo.run.manifest import described

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


def test_a_run_of_an_earlier_version_goes_on(begun, tmp_path):
    """Its manifests have no digest of themselves, its states no marks of the logs."""
    data, right, base = begun
    run_dir = toy_run.copied(base, tmp_path / "run")
    for folder in (run_dir / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        assert state.pop("logs")
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest.pop("sha256")
        manifest["files"]["state.json"] = described(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, run_dir))
    assert ended.sentence is None and "resuming after step 4" in ended.printed
    assert not any(words in ended.printed for words in SAID)
    assert not right.wrong_weights(run_dir) and right.has_logs_of(run_dir)


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
