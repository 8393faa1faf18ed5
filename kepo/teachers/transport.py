"""Requests to a server of a teacher: JSON over HTTP, a few at once, and again after what passes.

Python's own HTTP client: a request waits for one answer, and threads wait beside each other.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kepo.errors import KepoConfigError, KepoTeacherError, first_line
from kepo.sections import TeacherConfig

T = TypeVar("T")

FIRST_PAUSE = 1.0
"""Seconds before a request is made again; twice as long each further time."""
LONGEST_PAUSE = 60.0
PASSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP codes of a server that is busy, starting or restarting."""
KEY = "KEPO_TEACHER_KEY"
"""The environment variable of the key that the server asks for, if it does."""
LARGEST = 2**30
"""The most bytes of an answer that are read."""
BLOCK = 2**20


class Server:
    """A server by its address; counts the requests made to it."""

    def __init__(self, which: str, url: str, config: TeacherConfig):
        """Remember where the server is. which: the setting that names it, for errors."""
        self.which, self.url, self._config = which, url, config
        self._parts = urlsplit(url)
        try:
            known = bool(self._parts.hostname) and (self._parts.port or 1) > 0
        except ValueError:  # of a port that is no number
            known = False
        if not known:
            raise KepoConfigError(f"{which}={url!r} is no address; expected http://host:port/v1")
        self._root = self._parts.path.rstrip("/").removesuffix("/v1")
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._connected: set[http.client.HTTPConnection] = set()
        self._requests = self._again = 0

    def taken(self) -> tuple[int, int]:
        """Return how many requests were made since the last call, and how many of them again."""
        with self._lock:
            found = self._requests, self._again
            self._requests = self._again = 0
        return found

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the server's answer to a POST of ``body``, or to a GET.

        What may pass by itself (no connection, no answer in time, a busy server) is tried again,
        ``teacher_retries`` times after growing pauses. Raises KepoTeacherError then, and at once
        for an answer that will not change.
        """
        which, url = self.which, self.url
        last, pause = "", FIRST_PAUSE
        tries = self._config.teacher_retries + 1
        for number in range(tries):
            if number:
                if self._over.wait(pause):
                    break
                pause = min(2 * pause, LONGEST_PAUSE)
            with self._lock:
                self._requests += 1
                self._again += number > 0
            try:
                code, content = self._answer(path, body)
            except (OSError, http.client.HTTPException) as error:
                last = first_line(error) or type(error).__name__
                if isinstance(error, TimeoutError):
                    last = f"no answer within teacher_timeout={self._config.teacher_timeout:g} s"
                continue
            if code == 200:
                return self._read(path, content)
            last = f"{code}, {_reason(content)}"
            if code not in PASSES:
                key = f"; set {KEY} to the key that it asks for" if code in (401, 403) else ""
                raise Refused(f"{which}={url!r} refuses {path}: {last}{key}", code)
        raise KepoTeacherError(
            f"{which}={url!r} does not answer {path}: {last} (tried {tries} times); start the "
            "server again, or raise teacher_retries or teacher_timeout, and run the same command"
        )

    def ask_all(self, asks: Sequence[Callable[[], T]]) -> list[T]:
        """Return what the calls return, in their order; ``teacher_at_once`` of them run at once.
        The first error ends all of them."""
        self._over.clear()
        with ThreadPoolExecutor(max(1, min(len(asks), self._config.teacher_at_once))) as pool:
            try:
                return list(pool.map(lambda ask: ask(), asks))
            except BaseException:  # a second signal among them: do not wait for the others
                self._hang_up()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    # ---- private ----

    def _answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """Make one request; return the code and the content of its answer."""
        limit = self._config.teacher_timeout
        end = time.monotonic() + limit
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=limit)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self._connected.add(connection)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(
                "GET" if body is None else "POST", f"{self._root}{path}", content, headers
            )
            answer = connection.getresponse()
            blocks, size = [], 0
            while block := answer.read1(BLOCK):
                blocks.append(block)
                size += len(block)
                if time.monotonic() > end:  # a byte now and then is no answer
                    raise TimeoutError
                if size > LARGEST:
                    raise http.client.HTTPException(f"an answer of more than {LARGEST} bytes")
            if answer.length:
                raise http.client.IncompleteRead(b"".join(blocks), answer.length)
            return answer.status, b"".join(blocks)
        finally:
            with self._lock:
                self._connected.discard(connection)
            connection.close()

    def _hang_up(self) -> None:
        """End the requests that are under way, and the pauses before others."""
        self._over.set()
        with self._lock:
            for connection in self._connected:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _read(self, path: str, content: bytes) -> Any:
        which, url = self.which, self.url
        try:
            return json.loads(content)
        except ValueError as error:
            raise KepoTeacherError(
                f"{which}={url!r} answers {path} with no JSON: {_short(content)}"
            ) from error


class Refused(KepoTeacherError):
    """A server's answer that says no."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


def _reason(content: bytes) -> str:
    """Return what an answer with an error says, by any of the usual keys."""
    try:
        said = json.loads(content)
        said = said.get("error", said) if isinstance(said, dict) else said
        for key in ("message", "detail"):
            if isinstance(said, dict) and key in said:
                said = said[key]
        return first_line(ValueError(said))
    except ValueError:
        return _short(content)


def _short(content: bytes) -> str:
    return repr(content[:200].decode("utf-8", "replace")) if content else "nothing"
