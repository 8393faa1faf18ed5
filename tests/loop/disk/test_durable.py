"""A file has its new content or its old one, whatever happens; strict JSON; folders that last."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
from faulty_disk import failing, watched

from kepo.disk.durable import append_durably, as_json, make_folder, replacing, write_durably


def calls_of(root, work):
    calls = []
    with watched(root, lambda call, path: calls.append((call, Path(path).name))):
        work()
    return calls


def test_content_is_synced_before_it_takes_the_name_and_the_name_after(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    part = f".tmp-{os.getpid()}-file.json"
    calls = calls_of(tmp_path, lambda: write_durably(path, "new ü"))
    assert [name for name in calls if name[0] in ("fsync", "replace")] == [
        ("fsync", part),
        ("replace", part),
        ("fsync", tmp_path.name),
    ]
    assert path.read_bytes() == "new ü".encode() and list(tmp_path.iterdir()) == [path]


def test_whichever_call_fails_the_file_is_whole_and_named(tmp_path):
    path = tmp_path / "file.json"
    count = len(calls_of(tmp_path, lambda: write_durably(path, "old")))
    for number in range(1, count + 1):
        with (
            watched(tmp_path, failing(number, errno.ENOSPC, for_ever=False)),
            pytest.raises(OSError, match="No space left") as caught,
        ):
            write_durably(path, f"new {number}")
        assert path.read_text() in ("old", f"new {number}") and list(tmp_path.iterdir()) == [path]
        assert caught.value.filename in (str(path), str(tmp_path))


def test_a_link_is_followed_and_a_device_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_durably(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    write_durably(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(IsADirectoryError, match="there"):
        write_durably(tmp_path / "there", "x")


def test_a_picture_keeps_its_ending_and_a_failed_one_nothing(tmp_path):
    with replacing(tmp_path / "a.png") as part:
        assert part.suffix == ".png"
        part.write_bytes(b"x")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "b.png") as part:
        part.write_bytes(b"half")
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_lines_are_appended_and_synced(tmp_path):
    path = tmp_path / "log"
    write_durably(path, "")
    calls = calls_of(tmp_path, lambda: append_durably(path, "a\nb"))
    assert calls[-2:] == [("fsync", "log"), ("close", "log")] and path.read_text() == "a\nb\n"


def test_every_new_folder_is_synced_into_the_one_above(tmp_path):
    calls = calls_of(tmp_path, lambda: make_folder(tmp_path / "a" / "b"))
    assert [name for call, name in calls if call == "fsync"] == [tmp_path.name, "a"]
    assert calls_of(tmp_path, lambda: make_folder(tmp_path / "a" / "b")) == [("mkdir", "b")]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        make_folder(tmp_path / "file")


def test_json_is_strict():
    value = {"a": [math.nan, 1.0, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": "NaN"}
    assert json.loads(as_json(value)) == {
        "a": [None, 1.0, [None, None]],
        "b": {"c": None},
        "d": "NaN",
    }
    assert as_json({"x": 0.1}, indent=1) == json.dumps({"x": 0.1}, indent=1)


def test_half_a_character_is_written_as_its_escape(tmp_path):
    """Of a file name that is no UTF-8, as Python reads it."""
    name = os.fsdecode(b"\xff.png")
    write_durably(tmp_path / "a.json", as_json({"image": name, "é": 1}, ensure_ascii=False))
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_bytes())["image"] == name
