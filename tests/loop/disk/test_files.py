"""Files beside and instead of the data: copies that programs keep, links, and what is no file."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from datasets_on_disk import ROW, dataset, record, split_file
from PIL import Image

from kepo.__main__ import main
from kepo.config import Config
from kepo.data.images import looks_of, open_rgb
from kepo.data.load import layout_of, load_examples
from kepo.data.run_data import load_data, write_record
from kepo.disk.files import read_regular
from kepo.errors import KepoDataError


@pytest.fixture
def root(tmp_path) -> Path:
    return dataset(tmp_path / "data", record())


def folder_of(root: Path) -> Path:
    return root / "QA_information" / "Open-access"


# ---- copies that other programs keep


@pytest.mark.parametrize(
    "copy",
    [
        ".ipynb_checkpoints/a-checkpoint.json",
        ".a.json",
        "._a.json",
        "__MACOSX/a.json",
        "@eaDir/a.json",
        ".git/x/a.json",
        "$RECYCLE.BIN/a.json",
        "$Recycle.Bin/a.json",
        "#recycle/a.json",
        "@Recycle/a.json",
        "Temporary Items/a.json",
        "Network Trash Folder/a.json",
        "__pycache__/a.json",
        "a.json~",
        "#a.json#",
    ],
)
def test_a_hidden_copy_neither_wins_nor_counts(tmp_path, copy):
    """The copy says another answer; it sorts before the file."""
    stale = record(gt_answer="Nothing")
    root = dataset(tmp_path / "data", record())
    split = split_file(tmp_path / "splits", "modality/train/CT_train.json", ROW)
    cases = [(root, folder_of(root), stale)]
    cases += [(split.parent, split.parent, ROW | {"solution": "<answer> A </answer>"})]
    for data, folder, old in cases:
        file = folder / copy
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps([old]))
        (example,), report = load_examples(data)
        assert example.answer == "B" and report.records == 1 and not report.problems


COPIES = ["a (1)", "a copy", "Copy of a", "a.bak", "_a", "#a#", "a_old", "a~", "conflict/a"]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_says_otherwise_leaves_out_both(root, copy):
    """Names tell nothing: the first of "a copy.json" and "a.json" is the copy."""
    file = folder_of(root) / f"{copy}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([record(gt_answer="Nothing"), record(question_id="q1")]))
    (example,), report = load_examples(root)
    assert example.id == "q1" and report.records == 3 and report.counts() == {"duplicate id": 2}
    for problem, other in zip(report.problems, reversed(report.problems), strict=True):
        assert "'q0'" in problem.message and repr(other.where) in problem.message
    with pytest.raises(KepoDataError, match="'q0' has other contents"):
        load_examples(root, bad_records="fail")


@pytest.mark.parametrize("copy", COPIES)
def test_of_a_copy_that_says_the_same_one_is_kept(root, copy):
    file = folder_of(root) / f"{copy}.json"
    file.parent.mkdir(exist_ok=True)
    for more in ({}, {"dataset": "unread"}):
        file.write_text(json.dumps([record(**more)]))
        (example,), report = load_examples(root, bad_records="fail")
        assert example.id == "q0" and not report.problems
        assert report.quirks["the same record once more"] == 1


def test_of_three_records_with_one_id_each_names_the_others(root):
    rows = [record(), record(image_path="Images/y.png"), record(question_id="q1")]
    (folder_of(root) / "b.json").write_text(json.dumps(rows))
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["q1"] and report.counts() == {"duplicate id": 3}
    assert all(problem.message.count(".json[") == 2 for problem in report.problems)


def test_what_a_mac_leaves_is_not_json_and_no_bad_file(root):
    (folder_of(root) / "._a.json").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert not load_examples(root)[1].problems


def test_a_dataset_inside_a_hidden_folder_is_read(tmp_path):
    root = dataset(tmp_path / ".cache" / "data", record())
    assert len(load_examples(root)[0]) == 1


# ---- what is no file, or cannot be read


@pytest.fixture
def alarm():
    """Whoever waits for a FIFO's writer waits without end: a test would hang instead of failing."""

    def ring(number, frame):
        raise AssertionError("a FIFO was opened")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_fifo_is_a_bad_file_and_nobody_waits_for_it(root, alarm):
    os.mkfifo(folder_of(root) / "b.json")
    os.mkfifo(root / "Images" / "fifo.png")
    more = record(question_id="q1", image_path="Images/fifo.png")
    (folder_of(root) / "c.json").write_text(json.dumps([more]))
    examples, report = load_examples(root)
    assert [e.id for e in examples] == ["q0"]
    assert report.counts() == {"file": 1, "image missing": 1}
    assert all("it is a FIFO" in problem.message for problem in report.problems)
    with pytest.raises(KepoDataError, match=r"fifo.png: it is a FIFO; expected a regular file"):
        open_rgb(root / "Images" / "fifo.png")
    with pytest.raises(KepoDataError, match="has none of the layouts"):
        layout_of(folder_of(root) / "b.json")


def test_a_socket_a_device_and_a_folder_are_bad_files(root, monkeypatch):
    monkeypatch.chdir(folder_of(root))  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("b.json")
        Path("c.json").symlink_to("/dev/null")
        Path("d.json").mkdir()
        Path("e.json").symlink_to("nowhere")
        Path("f.json").write_text("")
        examples, report = load_examples(root)
    assert len(examples) == 1 and report.counts() == {"file": 5}
    found = {Path(problem.where).name: problem.message for problem in report.problems}
    for name, what in zip("bcdf", ("a socket", "a device", "a folder", "empty"), strict=True):
        assert what in found[f"{name}.json"]
    assert "No such file" in found["e.json"]


def test_what_may_not_be_read_is_a_bad_file(root, monkeypatch):
    """Of a file, and of a folder, which hides how many files."""
    locked = folder_of(root) / "locked"
    locked.mkdir()
    (locked / "b.json").write_text("[]")
    scan, listed, read = os.scandir, os.listdir, Path.read_bytes

    def refuse(real):
        def call(path):
            if "locked" in str(path) or str(path).endswith("c.json"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return call

    (folder_of(root) / "c.json").write_text("[]")
    monkeypatch.setattr(os, "scandir", refuse(scan))
    monkeypatch.setattr(os, "listdir", refuse(listed))
    monkeypatch.setattr(Path, "read_bytes", refuse(read))
    examples, report = load_examples(root)
    assert len(examples) == 1 and report.counts() == {"file": 2}
    assert {Path(p.where).name for p in report.problems} == {"locked", "c.json"}
    assert all("Permission denied" in problem.message for problem in report.problems)


def test_a_file_of_endless_size_is_not_read(root):
    with open(folder_of(root) / "b.json", "wb") as file:
        file.truncate(2**40)  # takes no room
    with open(root / "Images" / "y.png", "wb") as file:
        file.truncate(2**40)
    report = load_examples(root)[1]
    assert report.counts() == {"file": 1} and "split it" in report.problems[0].message
    with pytest.raises(KepoDataError, match="bytes; expected at most"):
        open_rgb(root / "Images" / "y.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([record()]).encode("utf-16"), "UTF-16"),
        ('["\u00e9"]'.encode("latin-1"), "utf-8"),
        (b" \n", "empty"),
        (b'{"a": 1, "a": 2}', "holds a dict"),
        (b"[" * 100_000, "not readable JSON"),
        (b"[1, 2", "not readable JSON"),
    ],
)
def test_other_content_is_named(root, content, message):
    (folder_of(root) / "b.json").write_bytes(content)
    report = load_examples(root)[1]
    assert report.counts() == {"file": 1} and message in report.problems[0].message


def test_a_file_in_capitals_is_read(root):
    (folder_of(root) / "B.JSON").write_text(json.dumps([record(question_id="q1")]))
    assert [e.id for e in load_examples(root)[0]] == ["q1", "q0"]


def test_read_regular_follows_links(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b") == b"12"


# ---- links


def test_a_linked_image_folder_is_inside(root, tmp_path):
    (root / "Images").rename(tmp_path / "disk")
    (root / "Images").symlink_to(tmp_path / "disk")
    (example,), report = load_examples(root)
    assert example.images == (tmp_path.resolve() / "disk" / "x.png",) and not report.problems


@pytest.mark.parametrize(
    "path", ["Images/../secret.png", "Images/out.png", "Images/deep/secret.png", "file.png"]
)
def test_no_record_leads_out_of_a_linked_image_folder(root, tmp_path, path):
    disk = tmp_path / "disk"
    (root / "Images").rename(disk)
    (root / "Images").symlink_to(disk)
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (disk / "out.png").symlink_to(tmp_path / "secret.png")
    (disk / "deep").symlink_to(tmp_path)
    (root / "file.png").symlink_to(tmp_path / "secret.png")
    bad = record(question_id="q1", image_path=path)
    (folder_of(root) / "b.json").write_text(json.dumps([bad]))
    report = load_examples(root)[1]
    assert report.counts() == {"image outside": 1}
    assert "a folder directly in it may be a link" in report.problems[0].message


def test_a_link_to_what_holds_the_dataset_is_no_way_out(root, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    bad = record(question_id="q1", image_path="up/secret.png")
    (folder_of(root) / "b.json").write_text(json.dumps([bad]))
    assert load_examples(root)[1].counts() == {"image outside": 1}


def test_linked_folders_of_records_are_read_and_rings_end(root, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "b.json").write_text(json.dumps([record(question_id="q1")]))
    (folder_of(root) / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "ring").symlink_to(folder_of(root))
    examples, report = load_examples(root)
    assert {e.id for e in examples} == {"q0", "q1"} and not report.problems


def test_images_beside_a_linked_split_file_are_found(tmp_path):
    file = split_file(tmp_path / "a", "CT_train.json", ROW)
    (tmp_path / "disk").mkdir()
    moved = file.rename(tmp_path / "disk" / "CT_train.json")
    file.symlink_to(moved)
    assert len(load_examples(file)[0]) == 1


# ---- paths and texts


def test_home_is_written_as_a_tilde(root, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(root.parent))
    assert load_examples("~/data")[1].path == root.resolve()
    assert load_examples(root, image_root="~/data")[1].questions == 1
    assert layout_of("~/data").name == "OmniMedVQA"
    assert main(["data", "check", "~/data"]) == 0
    with pytest.raises(KepoDataError, match="write the path out"):
        load_examples("~nobody-of-this-name/data")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_path": "Images/\udc80.png"},
        {"question": "What \ud800?"},
        {"option_A": "a\udfff"},
        {"gt_answer": "\udc80"},
        {"question_id": "\udc80"},
        {"modality_type": "\udc80"},
        {"question_type": "a\0b"},
        {"rationale": "a\0b"},
        {"question_id": "a\nb"},  # ids and names are lines of logs
        {"modality_type": "\x1b[2J"},
    ],
)
def test_text_that_cannot_be_stored_is_one_bad_record(root, tmp_path, changes):
    bad = record(question_id="q1") | changes
    (folder_of(root) / "b.json").write_text(json.dumps([bad]))
    data = load_data(Config(student="s", train_data=str(root), run_dir=str(tmp_path)))
    assert [e.id for e in data.train] == ["q0"] and data.record["train"]["bad_records"]
    (problem,) = data.record["train"]["first_problems"]
    assert "b.json[0]" in problem and repr(bad["question_id"]) in problem
    assert next(iter(changes)) in problem
    write_record(data, tmp_path, resuming=False)
    assert json.loads((tmp_path / "data.json").read_text())["train"]["questions"] == 1
    data.summary.encode()


def test_a_name_that_is_not_utf8_is_no_trouble(tmp_path):
    root = dataset(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), record(), record())
    os.rename(root / "Images" / "x.png", root / "Images" / "y.png")
    (root / "Images" / "x.png").symlink_to("y.png")
    data = load_data(Config(student="s", train_data=str(root), run_dir=str(tmp_path)))
    write_record(data, tmp_path, resuming=False)
    (data.train[0].images[0]).write_text("no pixels")
    (error,) = looks_of(data.train[0].images).values()
    (str(error) + data.summary).encode()


def test_a_long_value_is_not_repeated_in_full(root):
    bad = record(question_id="q1", gt_answer="x" * 10**6)
    (folder_of(root) / "b.json").write_text(json.dumps([bad]))
    assert len(load_examples(root)[1].problems[0].message) < 1000


def test_the_cache_mends_a_file_that_lost_its_content(tmp_path, monkeypatch):
    from kepo.data.images import locate

    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    (file,) = locate(lambda: [b"content"], tmp_path)
    file.write_bytes(b"")
    assert locate(lambda: [b"content"], tmp_path) == (file,) and file.read_bytes() == b"content"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(KepoDataError, match="set KEPO_CACHE"):
        locate(lambda: [b"content"], tmp_path)
