"""Output that works on terminals of any encoding, and is discarded where there is no terminal."""

from __future__ import annotations

import os
import sys


def any_terminal() -> None:
    """Make everything printed from now on reach standard output and error, whatever their encoding:
    a character that the encoding lacks appears as ``\\u8d85``, where Python would raise.

    A closed stream (``>&-``, a service without a terminal) is replaced by the null device, and so
    is its file descriptor. Otherwise the next opened file would get that descriptor, and a
    library's warning could be written into a checkpoint.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            _occupy(number)
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end
            setattr(sys, name, nowhere)
        elif hasattr(stream, "reconfigure"):  # not what a test put in its place
            stream.reconfigure(errors="backslashreplace")


def _occupy(number: int) -> None:
    """Point a file descriptor at the null device if it is not open."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
