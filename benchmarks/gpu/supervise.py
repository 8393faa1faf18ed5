"""Processes that may crash, hang or wreck the device, and a parent that outlives them all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STARTUP = 120.0  # seconds to import torch and find the device


class Verdict(NamedTuple):
    """PASS, FAIL, SKIP (it cannot run here) or LATE (the time is over), and a line about it."""

    word: str
    detail: str


class Worker:
    """A process of worker.py. What it prints is appended to the log."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]):
        self.name = name
        self.link, theirs = socket.socketpair()
        with theirs:
            self.process = started(
                [*command, "--socket", str(theirs.fileno())],
                log,
                environment,
                pass_fds=(theirs.fileno(),),
            )
        self.link.settimeout(0.2)
        self.heard = b""
        self.ready = False
        self.alive = True

    def ask(self, name: str, module: str, limit: float, on_row: Callable[[dict], None]) -> Verdict:
        """Runs a section; whatever becomes of it within `limit` seconds, there is a verdict."""
        until = time.monotonic() + limit
        try:
            if not self.ready:
                self.event(min(limit, STARTUP), "it did not start in time")
                self.ready = True
            # It is to end by itself a little before it is killed.
            order = {"name": name, "module": module, "until": until - min(2.0, 0.1 * limit)}
            self.link.sendall((json.dumps(order) + "\n").encode())
            while True:
                event = self.event(until - time.monotonic(), f"killed after {limit:.0f} s")
                if "row" in event:
                    on_row(event["row"])
                elif "done" in event:
                    self.alive = not event["dead"]
                    dead = f"; the context is dead: {event['dead']}" if event["dead"] else ""
                    return Verdict("FAIL" if dead else event["word"], event["detail"] + dead)
        except (OSError, EOFError, ValueError) as error:
            ended = self.process.poll()
            self.end()
            return Verdict("FAIL", str(error) if ended is None else f"its process {died(ended)}")

    def event(self, seconds: float, otherwise: str) -> dict:
        """The next line from the process."""
        until = time.monotonic() + seconds
        while b"\n" not in self.heard:
            if time.monotonic() > until:
                raise TimeoutError(otherwise)
            try:
                more = self.link.recv(1 << 16)
            except TimeoutError:
                # A process it left behind may hold the other end open.
                if self.process.poll() is not None:
                    raise EOFError from None
                continue
            if not more:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(10)
                raise EOFError("it closed its end")
            self.heard += more
        line, _, self.heard = self.heard.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        self.alive = False
        killed(self.process)
        self.link.close()


def command_run(
    command: list[str], limit: float, log: Path, environment: dict[str, str]
) -> tuple[int | None, list[str]]:
    """Exit status of a command (None: killed at its limit), and the lines it put into the log."""
    before = log.stat().st_size
    process = started(command, log, environment)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    killed(process)  # and what it left behind
    with log.open("rb") as file:
        file.seek(before)
        lines = file.read().decode(errors="replace").splitlines()
    return status, [line.strip() for line in lines if line.strip()]


def started(
    command: list[str], log: Path, environment: dict[str, str], **more: object
) -> subprocess.Popen:
    """In a session of its own, so that it can be killed with all that it starts."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            **more,
        )


def killed(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that waits for a dead driver cannot be killed
        process.wait(10)


def died(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
