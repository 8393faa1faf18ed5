"""Ctrl-C and SIGTERM end a run after saving; a second one ends it at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from kepo.parallel import is_first, together

SAME_SIGNAL = 2.0
"""Seconds within which signals are one: a terminal sends Ctrl-C to torchrun and to its processes,
and torchrun passes it on to them."""


class StopRequest:
    """Holds the signal that asked the run to stop. Handlers only note it: the loop asks at step
    boundaries."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted: int | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Stop if any process has been asked to. All must call, at the same place of the run."""
        asked = [number for number in together(self._noted) if number is not None]
        self.signal = asked[0] if asked else None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal, as a shell reports it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted, self._at = number, time.monotonic()
            if is_first():
                print(
                    "\nstopping after this step; once more to stop at once without saving",
                    flush=True,
                )
        elif time.monotonic() - self._at > SAME_SIGNAL:
            raise SystemExit(128 + number)
