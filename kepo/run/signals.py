"""Signals that ask a run to stop: it saves first. A second one ends it at once.

Ctrl-C and SIGTERM; SIGHUP, when a terminal closes; SIGUSR1 and SIGUSR2, which schedulers send some
minutes before the end; SIGXCPU, when the limit on processor time is near. A signal that was ignored
when the process began, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kepo.distributed.processes import all_gather, is_rank0

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
SAME_SIGNAL = 2.0
"""Seconds within which two signals count as one: a terminal sends Ctrl-C to torchrun and to its
processes, and torchrun passes it on to them."""


class StopRequest:
    """The signal that asked the run to stop, if any. Handlers only note it: the loop checks at step
    boundaries, an evaluation after each batch. In a thread other than the main one no signal is
    noted."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted: int | None = None
        self._last = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not Python's to put back
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Stop if any rank has been asked to. All ranks call, at the same place of the run."""
        asked = [number for number in all_gather(self._noted) if number is not None]
        self.signal = asked[0] if asked else None

    def noted(self) -> bool:
        """Return whether this process has been asked to stop, whatever the other ranks know."""
        return self._noted is not None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return 128 + signal, as a shell reports it: 130 after Ctrl-C, 143 after SIGTERM; 0 if
        there was none."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None and time.monotonic() - self._at <= SAME_SIGNAL:
            return
        if number == signal.SIGXCPU and self._noted is not None:
            return  # the kernel sends it every second from the first one on
        # The scheduler's SIGTERM after its warning is still the first to end the run.
        if self._noted is None or (self._last in WARNINGS and number not in WARNINGS):
            self._noted = number if self._noted is None else self._noted
            self._last, self._at = number, time.monotonic()
            if is_rank0():
                _tell("stopping after this step; once more to stop at once without saving")
        else:
            # Python's own end for Ctrl-C: a notebook knows it, and goes on.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _tell(text: str) -> None:
    """Write ``text`` past sys.stderr: a signal may come in the middle of a line written to it."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


# ---- a terminal that goes away ----


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep the run going within the block if its terminal or pipe closes: only output is lost."""
    before = sys.stdout, sys.stderr
    lasting = [_Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Send a stream that has no reader any more to os.devnull: Python flushes it at exit too,
        which would change the exit code."""
        if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
