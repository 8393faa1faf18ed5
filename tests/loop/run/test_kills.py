"""kill -9 at any moment, over and over: the run goes on to the same bits and the same logs.

Everything is imported once, and each run that is killed is a fork of this process: a killed run
costs what it did, not what it imported.
"""

import faulthandler
import os
import random
import signal
import sys
import time

import pytest
import toy_run
from faulty_disk import watched

from kepo.run import checkpoint
from kepo.run.checkpoint import PARTS
from kepo.run.manifest import verify

KILLS_EACH = 5


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Data, what the whole run ends with, the calls by which it changes files, and its seconds."""
    root = tmp_path_factory.mktemp("known")
    data = toy_run.write_dataset(root / "data")
    calls = []
    with toy_run.toys():
        with watched(root / "whole", lambda call, path: calls.append(call)):
            right = toy_run.undisturbed(data, root / "whole" / "run")
        started = time.perf_counter()  # of a run that finds everything warm
        toy_run.undisturbed(data, root / "again")
    return data, right, len(calls), time.perf_counter() - started


def killed(config, rng: random.Random, calls: int, seconds: float) -> int:
    """Train in a fork until it is killed, at a random time or before a random call that changes a
    file; -9 if it was, 0 if it was through before."""
    by_time, seconds = rng.random() < 0.5, rng.uniform(0.0, seconds)
    number, count = rng.randrange(1, calls), 0

    def die(call: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number and not by_time:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # should it hang
        try:
            with watched(toy_run.Path(config.run_dir).parent, die):
                ended = toy_run.run(config)
            os._exit(0 if ended.sentence is None else 1)
        finally:
            os._exit(2)
    if by_time:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_runs(known, root, runs):
    data, right, calls, seconds = known
    kills, faults = 0, []
    with toy_run.toys():
        for number in runs:
            rng = random.Random(number)
            config = toy_run.config_of(data, root / f"run-{number}")
            ends = [killed(config, rng, calls // 2, seconds / 2) for _ in range(KILLS_EACH)]
            kills += ends.count(-signal.SIGKILL)
            if not set(ends) <= {0, -signal.SIGKILL}:
                faults.append(f"{number}: a fork ended in an error: {ends}")
            ended = toy_run.run(config)
            run_dir = root / f"run-{number}"
            wrong = ended.sentence or right.wrong_weights(run_dir)
            if wrong or not right.has_logs_of(run_dir):
                faults.append(f"{number}: {wrong or 'logs'}")
            half = [x.name for x in run_dir.glob("checkpoints/step-*") if verify(x, PARTS)]
            if half:
                faults.append(f"{number}: half checkpoints {half}")
    return kills, faults


def test_a_run_killed_over_and_over(known, tmp_path):
    kills, faults = killed_runs(known, tmp_path, [0])
    assert kills and not faults, faults


@pytest.mark.slow
def test_50_kills(known, tmp_path, capsys):
    kills, faults, runs = 0, [], 0
    while kills < 50:  # those that came after the end do not count
        more, wrong = killed_runs(known, tmp_path, [runs])
        kills, faults, runs = kills + more, faults + wrong, runs + 1
    with capsys.disabled():
        print(f"\nkills: {kills} in {runs} runs, {runs - len(faults)} ended in the same bits")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_checkpoints_written_in_place_would_be_seen(known, tmp_path, monkeypatch):
    def begin(target):
        target.mkdir(parents=True)
        return target

    monkeypatch.setattr(checkpoint, "begin_folder", begin)
    monkeypatch.setattr(checkpoint, "finish_folder", lambda folder, target: None)
    _, faults = killed_runs(known, tmp_path, range(3))
    assert faults
