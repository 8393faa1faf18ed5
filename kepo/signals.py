"""Ctrl-C and SIGTERM end a run after saving; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Holds the signal that asked the run to stop. Handlers only note it: the loop looks at step
    boundaries."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal, as a shell reports it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number
        print("\nstopping after this step; once more to stop at once without saving", flush=True)
