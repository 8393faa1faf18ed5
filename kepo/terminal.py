"""Words reach terminals of every encoding: what one lacks is written as an escape."""

from __future__ import annotations

import sys


def any_terminal() -> None:
    """Have everything printed from now on arrive on standard output and error, whatever their
    encoding: a character that it lacks appears as ``\\u8d85``, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not None, and not what a test put in its place
            stream.reconfigure(errors="backslashreplace")
