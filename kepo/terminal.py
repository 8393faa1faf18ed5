"""Words reach terminals of every encoding, and go nowhere where there is no terminal."""

from __future__ import annotations

import os
import sys


def any_terminal() -> None:
    """Have everything printed from now on arrive on standard output and error, whatever their
    encoding: a character that it lacks appears as ``\\u8d85``, where Python would raise.

    A stream that is closed (``>&-``, a service without a terminal) leads to the null device, and so
    does its number, which the next file to be opened would get: a library's warning would be
    written into a checkpoint.
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
    """Have a descriptor lead to the null device, if nothing has it."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
