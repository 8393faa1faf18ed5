"""A process that stands still is told from one that works, and from one that waits for it."""

import functools
import signal
import sys
import threading
import time

import pytest
from places import SUPPORT
from several import bare

from kepo.distributed import watchdog
from kepo.distributed.watchdog import Report, processor_seconds, stalled, standing

WORKS = Report(7, still=1.0, waits=False, place="sample at rollout.py:1")
SLEEPS = Report(7, still=130.0, waits=False, place="read at images.py:2")
WAITS = Report(7, still=150.0, waits=True, place="all_gather at processes.py:3")
LEFT = Report(7, still=900.0, waits=False, place="the end", left=True)


def test_who_neither_works_nor_waits_is_to_blame():
    judged = functools.partial(stalled, limit=120.0)
    assert judged({0: WORKS, 1: WORKS}) is None
    assert judged({0: WORKS, 1: WAITS}) is None  # however long: reading may take hours
    assert judged({0: WAITS, 1: LEFT, 2: WORKS}) is None
    assert judged({0: WAITS, 1: SLEEPS, 2: WAITS}) == (
        "rank 1 has not moved for 2 minutes (read at images.py:2) (rank_timeout_minutes: 2); "
        "rank 0: all_gather at processes.py:3; rank 2: all_gather at processes.py:3"
    )
    assert judged({0: WORKS, 1: SLEEPS}).startswith("rank 1 has not moved")
    assert judged({0: WAITS, 1: WAITS}).startswith("every rank waits for another, for 2 minutes")


def test_using_the_processor_is_moving_and_sleeping_is_not():
    def work(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            sum(range(1000))

    before = processor_seconds()
    work(0.2)
    assert processor_seconds() - before > 0.1
    before = processor_seconds()
    time.sleep(0.2)
    assert processor_seconds() - before < 0.1
    # What works for the main thread counts, what serves in the background does not.
    for daemon, counts in ((False, True), (True, False)):
        gone = threading.Event()
        before = processor_seconds()
        worked = threading.Event()

        def worker(worked=worked, gone=gone):
            work(0.3)
            worked.set()
            gone.wait()

        thread = threading.Thread(target=worker, daemon=daemon)
        thread.start()
        worked.wait()
        assert (processor_seconds() - before > 0.15) == counts
        gone.set()
        thread.join()


def test_where_a_thread_stands_says_whether_it_waits():
    def code(file, call="call()"):
        """A function of a file by that name, which calls what it is given."""
        found = {}
        exec(compile(f"def inner(call): return {call}", file, "exec"), found)
        return found["inner"]

    collective = code("/lib/torch/distributed/distributed_c10d.py")
    ours = code(f"{watchdog.PACKAGE}/rollout/rollouts.py")
    backward = code("/lib/torch/autograd/graph.py")
    module = code("/lib/torch/nn/modules/linear.py")
    reward = code("/home/someone/rewards.py")

    def stack(*functions):
        inner, *outer = functions
        call = functools.partial(inner, lambda: sys._getframe(1))
        for function in outer:
            call = functools.partial(function, call)
        return standing(call())

    assert stack(collective, ours) == (
        True,
        "inner at distributed/distributed_c10d.py:1, for inner at rollout/rollouts.py:1",
    )
    assert stack(backward, ours)[0]
    assert not stack(module, ours)[0] and not stack(reward, ours)[0] and not stack(ours)[0]
    # What waits for its own reward or picture does not wait for another process, wherever from.
    assert not stack(reward, collective, ours)[0] and not stack(ours, collective)[0]
    assert standing(None) == (False, "no code")


def two(folder, **environment):
    """Two processes that meet, and then what HOW says."""
    return bare(SUPPORT / "stands_still.py", MEET=str(folder / "here"), **environment)


@pytest.mark.slow
@pytest.mark.processes
def test_the_one_that_stands_still_is_named_by_all(tmp_path):
    for process in two(tmp_path, TIMEOUT="3", HOW="sleeps"):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "error: rank 1 has not moved for 3 s (<module> at support/stands_still.py:" in output
        assert "; rank 0: " in output and "Traceback" not in output, output


@pytest.mark.slow
@pytest.mark.processes
def test_the_others_say_that_one_has_ended(tmp_path):
    first, second = two(tmp_path, TIMEOUT="60", HOW="killed")
    output, _ = first.communicate(timeout=120)
    assert second.wait(timeout=120) == -9 and first.returncode == 1
    second.communicate()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0: another process of this run has ended, or cannot be")
    assert ".cc" not in line and "Traceback" not in output, output


@pytest.mark.slow
@pytest.mark.processes
def test_a_job_that_the_scheduler_paused_goes_on(tmp_path):
    """Longer than the limit: nobody stood still of its own accord."""
    both = two(tmp_path, TIMEOUT="4", HOW="paused")
    for process in both:
        assert process.stdout.readline() == "here\n"
    for process in both:
        process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    for process in both:
        process.send_signal(signal.SIGCONT)
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
