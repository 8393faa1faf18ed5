"""Judge whether formulas are equal by math-verify, in a process of its own.

It may compute for ever, deep in C, where neither a signal nor a thread could stop it. So a process
is started with the first formula, ends itself where one takes too long, and is started anew for the
next. It reads a line of JSON for each question and ends with its input, however kepo ends.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from typing import IO

from kepo.errors import KepoPackageError, first_line

LIMIT = 5.0
"""The seconds in which two formulas are found equal; those that take longer count as different."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What is sent to all processes of a run, which then finishes its step, and needs its judge."""


def same_formula(said: str, right: str) -> bool:
    """Return whether two formulas are equal, as far as is found within LIMIT."""
    return _JUDGES.setdefault(os.getpid(), _Judge()).same(said, right)


class _Judge:
    """The process that judges, if there is one, and whose turn it is to ask."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same(self, said: str, right: str) -> bool:
        with self.turn:
            answer = ""
            try:
                if self.process is None or self.process.poll() is not None:
                    self.process = _started()
                answer = _asked(self.process, [said, right])
            finally:  # after an interrupt, too: the answer to come is not the next question's
                if not answer:
                    self.end()
            return bool(answer) and json.loads(answer)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # closes its pipes
            self.process = None


_JUDGES: dict[int, _Judge] = {}
"""By process: a fork of this one must not talk with its judge."""


@atexit.register
def _end() -> None:
    if (judge := _JUDGES.get(os.getpid())) is not None:
        judge.end()


def _started() -> subprocess.Popen[str]:
    """Start the process, and wait until it has imported math-verify."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is sent to a whole session
    )
    problem = json.loads(_answer(process) or '"it ended without a word"')
    if problem is not None:
        process.communicate()
        raise KepoPackageError(
            f"task: math-verify is installed but does not work ({problem}); install it anew: "
            "pip install 'kepo[math]', or remove it"
        )
    return process


def _asked(process: subprocess.Popen[str], question: list[str]) -> str:
    """Return the line that answers a question; "" if the process has ended over it."""
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps(question)}\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


# ---- in that process ----


def _answer_all(questions: IO[str], answers: IO[str]) -> None:
    """Answer each line with a line, after one that says what is wrong with math-verify, or null."""
    try:
        from math_verify import parse, verify
    except Exception as error:  # of a package that is not ours
        print(json.dumps(f"{type(error).__name__}: {first_line(error)}"), file=answers, flush=True)
        return
    logging.disable()  # it warns that there is no time limit
    print("null", file=answers, flush=True)
    with open(os.devnull, "wb") as nowhere:
        for line in questions:
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=nowhere)
            said, right = json.loads(line)
            gold, given = (
                parse(f"\\boxed{{{text.strip('$ ')}}}", parsing_timeout=None)
                for text in (right, said)
            )
            same = bool(gold) and bool(given) and verify(gold, given, timeout_seconds=None)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(bool(same)), file=answers, flush=True)


if __name__ == "__main__":
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    _answer_all(sys.stdin, output)
