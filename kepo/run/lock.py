"""A lock that allows one run per folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kepo.disk.durable import make_folder, naming, remove_leftovers
from kepo.disk.files import refuse_irregular
from kepo.distributed.processes import on_rank0
from kepo.errors import KepoConfigError

WRITTEN = ("lock", "metrics.jsonl", "completions.jsonl", "data.json", "curves.png")
"""Files of a run folder, not counting its checkpoints."""
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error numbers of file systems without locks: Lustre ENOSYS, NFS without lock daemon ENOLCK."""


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Refuse a second run in the same folder; the lock is released when rank 0 ends, however it
    ends. All ranks call.

    Raises KepoConfigError if the folder is in use, OSError if a folder or a pipe is in the place of
    a file that the run will write. On a file system without locks it prints that a
    second run will not be noticed, and goes on.
    """
    with ExitStack() as stack:
        on_rank0(lambda: _lock(run_dir, stack))
        yield


def _lock(run_dir: Path, stack: ExitStack) -> None:
    make_folder(run_dir)
    refuse_irregular(run_dir, WRITTEN)
    path = run_dir / "lock"
    with naming(path):
        file = stack.enter_context(path.open("a+", encoding="utf-8"))  # "w" would empty another's
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                by = file.read(300).strip()
                raise KepoConfigError(
                    f"run_dir={str(run_dir)!r} is in use by another process"
                    f"{f' ({by})' if by else ''}; wait for it, or choose another"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"{run_dir}: its file system has no locks ({error.strerror}); a second run in the "
                "same folder would not be noticed"
            )
            return
        remove_leftovers(run_dir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
