"""Formulas are judged in a process of their own: with a time limit in any thread, and no orphan."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from places import ROOT

from kepo.errors import KepoPackageError
from kepo.tasks import formulas
from kepo.tasks.formulas import same_formula

ENDLESS = ("9^{9^{9^{9}}}", "9^{9^{9^{8}}}")
"""Python's own integers, which heed no signal."""


def judge() -> subprocess.Popen:
    return formulas._JUDGES[os.getpid()].process


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.timeout(60)
def test_an_endless_formula_is_no_answer_in_any_thread_and_the_next_is_judged():
    found = []

    def ask():
        found.append(same_formula(*ENDLESS))
        found.append(same_formula("1 + x^2", "x^2 + 1"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_several_threads_each_get_their_own_answers():
    found = {}

    def ask(n):
        found[n] = [same_formula(f"{k} + x^{n}", f"x^{n} + 3") for k in range(6)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers == [k == 3 for k in range(6)] for answers in found.values())
    assert len(found) == 4


def test_an_interrupted_question_does_not_answer_the_next(monkeypatch):
    assert same_formula("x + 1", "1 + x")

    def interrupted(process):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(formulas, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            same_formula("x + 1", "1 + x")
    assert not same_formula("x + 1", "2 + x")


def test_what_ends_a_run_softly_does_not_end_its_judge():
    assert same_formula("x + 1", "1 + x")
    process = judge()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
    assert same_formula("x + 2", "2 + x") and judge() is process
    process.kill()
    process.wait()
    assert same_formula("x + 2", "2 + x") and judge() is not process


def test_a_fork_has_a_judge_of_its_own():
    assert same_formula("x + 1", "1 + x")
    code = (
        "import os; from kepo.tasks import formulas as f; s = f.same_formula; s('x + 1', '1 + x')"
        "\npids = lambda: {judge.process.pid for judge in f._JUDGES.values()}; before = pids()"
        "\nif (child := os.fork()) == 0:"
        "\n    os._exit(7 if s('x + 3', '3 + x') and pids() > before else 8)"
        "\nassert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 and s('y + 2', '2 + y')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_imports_no_torch():
    assert same_formula("x + 1", "1 + x")
    assert "torch" not in Path(f"/proc/{judge().pid}/maps").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("end", ["by itself", "killed", "killed over a question"])
def test_it_ends_with_the_interpreter(end):
    last = f"s(*{ENDLESS!r})" if end == "killed over a question" else "time.sleep(60)"
    code = (
        "import os, time; from kepo.tasks.formulas import _JUDGES, same_formula as s\n"
        "assert s('x + 1', '1 + x'); print(_JUDGES[os.getpid()].process.pid, flush=True)\n"
        f"{'' if end == 'by itself' else last}"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        pid = int(program.stdout.readline())
        if end != "by itself":
            time.sleep(0.3)
            program.kill()
        program.wait(20)
    until = time.monotonic() + formulas.LIMIT + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_library_that_does_not_work_is_said(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise RuntimeError('no antlr')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KepoPackageError, match=r"^task: math-verify .* \(RuntimeError: no antlr\)"):
        formulas._Judge().same("x", "y")
