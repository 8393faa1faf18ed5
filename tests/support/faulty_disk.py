"""A disk that fails when told to, and one that loses what was not synced, under a run in this
process.

All calls by which Python changes names and contents go through here, and count: opening a file to
write, writing, syncing, renaming, unlinking, making and removing folders; and safetensors' own
writing, which Python does not see, as one call.
"""

import builtins
import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import toy_run
from safetensors import SafetensorError

from kepo.run import optimizer_state

CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "link", "symlink")


class PowerLoss(BaseException):
    """Nothing runs any more."""


class Writer:
    """A file open to write, whose writes, flushes and closing are watched."""

    def __init__(self, file, watch: Callable[[str, str], None], name: str):
        self._file, self._watch, self._name = file, watch, name

    def write(self, content):
        self._watch("write", self._name)
        return self._file.write(content)

    def __enter__(self):
        self._file.__enter__()
        return self

    def flush(self):
        self._watch("flush", self._name)
        self._file.flush()

    def __exit__(self, *error):
        self._file.__exit__(*error)
        if error[0] is None:  # what the buffer held was written only now
            self._watch("close", self._name)

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


@contextmanager
def watched(
    root: Path,
    on_write: Callable[[str, str], None] = lambda call, path: None,
    on_read: Callable[[str, str], None] = lambda call, path: None,
) -> Iterator[None]:
    """``on_write(call, path)`` before each call that changes something under ``root``, and
    ``on_read`` before each that opens, looks at or lists; what they raise is what the call raises.
    """
    top = os.path.realpath(root)

    def inside(path) -> str | None:
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
            path = os.readlink(path) if os.path.islink(path) else ""
        path = os.path.abspath(os.fspath(path))
        return path if path == top or path.startswith(top + os.sep) else None

    real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync
    real_stat, real_scandir, real_listdir = os.stat, os.scandir, os.listdir

    def opened(file, mode="r", *arguments, **named):
        path = None if isinstance(file, int) else inside(file)
        writes = any(letter in mode for letter in "wax+")
        if path is not None:
            (on_write if writes else on_read)("open", path)
        found = real_open(file, mode, *arguments, **named)
        return Writer(found, on_write, path) if path is not None and writes else found

    def os_opened(path, flags, *arguments, dir_fd=None, **named):
        if dir_fd is None and (known := inside(path)) is not None:
            (on_write if flags & (os.O_WRONLY | os.O_RDWR) else on_read)("open", known)
        return real_os_open(path, flags, *arguments, dir_fd=dir_fd, **named)

    def synced(descriptor):
        if (path := inside(descriptor)) is not None:
            on_write("fsync", path)
        real_fsync(descriptor)

    def looked(real, call):
        def look(path=".", *arguments, **named):
            if named.get("dir_fd") is None and (known := inside(path)) is not None:
                on_read(call, known)
            return real(path, *arguments, **named)

        return look

    def changed(name):
        real = getattr(os, name)

        def change(path, *arguments, **named):
            folder = named.get("dir_fd")
            known = inside(path if folder is None else folder)
            if known is not None:
                on_write(name, known if folder is None else os.path.join(known, os.fspath(path)))
            return real(path, *arguments, **named)

        return change

    real_save = safetensors.torch.save_file

    def saved(tensors, path, *arguments, **named):
        try:
            on_write("save_file", os.fspath(path))
        except OSError as error:  # as safetensors words it
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(text) from None
        real_save(tensors, path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", opened)
        patch.setattr(os, "open", os_opened)
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "stat", looked(real_stat, "stat"))
        patch.setattr(os, "scandir", looked(real_scandir, "list"))
        patch.setattr(os, "listdir", looked(real_listdir, "list"))
        for name in CHANGES:
            patch.setattr(os, name, changed(name))
        for module in (safetensors.torch, optimizer_state, toy_run):
            patch.setattr(module, "save_file", saved)
        yield


def failing(number: int, code: int, *, for_ever: bool) -> Callable[[str, str], None]:
    """An ``on_write`` whose call of that number raises, or from it on every one; unlinking and
    removing, which give a full disk its space back, apart."""
    count = 0

    def fail(call: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number or (for_ever and count > number and call not in ("unlink", "rmdir")):
            named = call not in ("write", "flush", "close", "fsync")  # by a number, they are not
            raise OSError(code, os.strerror(code), path if named else None)

    return fail


def unreadable(bad: str) -> Callable[[str, str], None]:
    """An ``on_read`` for which one file's sectors cannot be read any more."""

    def fail(call: str, path: str) -> None:
        if call == "open" and path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    return fail


# ---- a loss of power ----


class Disk:
    """Remembers what of a folder has been synced, and what it then loses with the power.

    A file's content is safe as it was when it was last synced; a folder's names likewise. Of what
    came after, every name may or may not have reached the disk, and of every content nothing, a
    part, zeros, or all: in any order.
    """

    def __init__(self, root: Path, rng: random.Random):
        self.root, self.rng = root, rng
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, os.stat_result]] = {}
        self.held: list[int] = []  # open, so that the number of a removed file is not used again
        for folder, _, files in os.walk(root):
            self.remember(folder)
            for name in files:
                self.remember(os.path.join(folder, name))

    def remember(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        self.held.append(descriptor)
        number = os.fstat(descriptor).st_ino
        if os.path.isdir(path):
            entries = {name: os.path.join(path, name) for name in os.listdir(path)}
            self.names[number] = {name: os.lstat(entry) for name, entry in entries.items()}
        else:
            self.contents[number] = Path(path).read_bytes()

    def close(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)

    def lose_power(self, image: Path) -> None:
        """What is on the disk when the power is back, written to ``image``."""
        there: dict[int, str] = {}
        for folder, _, files in os.walk(self.root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                there[os.lstat(path).st_ino] = path
        self._folder(os.lstat(self.root).st_ino, there, image)

    def _folder(self, number: int, there: dict[int, str], image: Path) -> None:
        image.mkdir()
        safe = {name: found.st_ino for name, found in self.names.get(number, {}).items()}
        kinds = {found.st_ino: found for found in self.names.get(number, {}).values()}
        now: dict[str, int] = {}
        if number in there:
            for name in os.listdir(there[number]):
                found = os.lstat(os.path.join(there[number], name))
                now[name], kinds[found.st_ino] = found.st_ino, found
        for name in sorted(safe.keys() | now.keys()):
            choices = [safe.get(name), now.get(name)]
            chosen = self.rng.choice(choices)
            if chosen is None:
                continue
            if os.path.stat.S_ISDIR(kinds[chosen].st_mode):
                if not (image / name).exists():
                    self._folder(chosen, there, image / name)
            else:
                (image / name).write_bytes(self._content(chosen, there))

    def _content(self, number: int, there: dict[int, str]) -> bytes:
        safe = self.contents.get(number)
        now = Path(there[number]).read_bytes() if number in there else safe or b""
        if safe == now:
            return now
        if safe is not None and now.startswith(safe):  # appended to
            return safe + self._torn(now[len(safe) :])
        return self.rng.choice([safe or b"", self._torn(now)])

    def _torn(self, content: bytes) -> bytes:
        """Nothing of it, the beginning, the same with zeros for the rest, all zeros, or all."""
        cut = self.rng.randrange(len(content) + 1)
        return self.rng.choice(
            [
                b"",
                content[:cut],
                content[:cut] + bytes(len(content) - cut),
                bytes(len(content)),
                content,
            ]
        )


def run_until_power_loss(config, number: int, rng: random.Random) -> int | None:
    """Train until the power goes before the call of that number; the run folder is then what the
    disk kept of it. Returns the calls that were made, or None if the power went."""
    root = Path(config.run_dir)
    disk = Disk(root.parent, rng)
    image = root.parent.with_name(root.parent.name + "-image")
    count = 0

    def note(call: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            disk.lose_power(image)
            raise PowerLoss

    def after_sync(call: str, path: str) -> None:
        note(call, path)
        if call == "fsync":
            disk.remember(path)

    try:
        with watched(root.parent, after_sync):
            ended = toy_run.run(config)
            assert ended.sentence is None, ended
    except PowerLoss:
        shutil.rmtree(root.parent)
        image.rename(root.parent)
        return None
    finally:
        disk.close()
    return count
