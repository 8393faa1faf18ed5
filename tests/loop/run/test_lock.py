"""One run per folder, also where the file system has no locks to see to it."""

import errno
import fcntl
import os
import socket

import pytest

from kepo.errors import KepoConfigError
from kepo.run import lock
from kepo.run.lock import exclusive


def refusing(code, monkeypatch):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_gone_on_with(tmp_path, monkeypatch, capsys, code):
    refusing(code, monkeypatch)
    entered = False
    with exclusive(tmp_path / "run"):
        entered = True
    out = capsys.readouterr().out
    assert entered and out.count("\n") == 1 and os.strerror(code) in out
    assert "would not be noticed" in out and str(tmp_path / "run") in out


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_lock_is_in_use_and_names_who_has_it(tmp_path, monkeypatch, code):
    with exclusive(tmp_path):
        pass
    refusing(code, monkeypatch)
    known = rf"in use by another process \(process {os.getpid()} on {socket.gethostname()}\)"
    with pytest.raises(KepoConfigError, match=known), exclusive(tmp_path):
        raise AssertionError("entered")
    (tmp_path / "lock").write_text("")  # of an earlier version
    with pytest.raises(KepoConfigError, match="by another process; wait"), exclusive(tmp_path):
        raise AssertionError("entered")


def test_the_lock_is_real_and_goes_with_the_run(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path):
            with pytest.raises(KepoConfigError, match=f"process {os.getpid()}"):
                exclusive(tmp_path).__enter__()
            assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_another_error_is_the_disks(tmp_path, monkeypatch):
    refusing(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=r"Input/output error.*lock"), exclusive(tmp_path):
        raise AssertionError("entered")


def test_what_a_killed_run_had_begun_to_write_is_removed(tmp_path, monkeypatch):
    for name in (".tmp-7-metrics.jsonl", ".tmp-1-data.json", ".tmp-7-", ".tmp-x", "tmp-7-a"):
        (tmp_path / name).write_text("half")
    monkeypatch.setattr(lock.os, "kill", lambda process, _: only_1_runs(process))
    with exclusive(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".tmp-1-data.json", ".tmp-7-", ".tmp-x", "tmp-7-a", "lock"}


def only_1_runs(process):
    if process != 1:
        raise ProcessLookupError
