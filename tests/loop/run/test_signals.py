"""Signals that ask a run to stop, and terminals that go away while it runs."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kepo.run import signals
from kepo.run.signals import SIGNALS, StopRequest, lasting_output


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def clock(monkeypatch):
    """Moves on by hand: seconds tell one signal from a second one."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_each_signal_is_noted_and_gives_its_exit_code(number, capfd):
    before = {one: signal.getsignal(one) for one in SIGNALS}
    with StopRequest() as stop:
        stop.agree()
        assert not stop and stop.exit_code == 0
        send(number)
        assert stop.noted() and not stop  # until all have agreed
        stop.agree()
        assert stop and stop.exit_code == 128 + number
    assert "stopping after this step" in capfd.readouterr().err
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
    ],
)
def test_a_second_signal_ends_at_once(clock, first, second):
    with StopRequest():
        send(first)
        clock(1.0)
        send(second)  # torchrun passes on what the terminal has sent already
        clock(1.5)
        if second == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                send(second)
            return
        with pytest.raises(SystemExit) as end:
            send(second)
        assert end.value.code == 128 + second


def test_sigterm_after_the_schedulers_warning_lets_the_run_save(clock):
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        clock(300.0)
        send(signal.SIGTERM)
        stop.agree()
        assert stop.exit_code == 128 + signal.SIGUSR1
        clock(10.0)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)


def test_the_limit_on_processor_time_is_no_second_signal_however_often_it_comes(clock):
    """From the soft limit on the kernel sends it every second, and SIGKILL at the hard one."""
    with StopRequest() as stop:
        for _ in range(5):
            send(signal.SIGXCPU)
            clock(3.0)
        stop.agree()
        assert stop.exit_code == 128 + signal.SIGXCPU
        send(signal.SIGTERM)
        clock(3.0)
        send(signal.SIGXCPU)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)


def test_what_was_ignored_stays_ignored():
    """As SIGHUP is under nohup, and Ctrl-C for what a script started in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            assert not stop.noted() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            send(signal.SIGTERM)
            assert stop.noted()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_there_are_no_handlers():
    found = []

    def ask():
        with StopRequest() as stop:
            found.append(stop.noted())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_terminal_that_closed_takes_no_error_to_the_run(monkeypatch):
    """A read or write after the other end of a terminal has gone is EIO."""
    ours, theirs = os.openpty()
    stream = os.fdopen(theirs, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("seen")
        assert os.read(ours, 100).startswith(b"seen")
        os.close(ours)
        for _ in range(3):
            print("not seen", flush=True)
        assert sys.stderr.write("not seen") == 8
        assert sys.stdout.isatty() is False  # it leads nowhere by now
    assert sys.stdout is stream


PROGRAM = """
import sys, time
from tqdm import tqdm
from kepo.run.signals import StopRequest, lasting_output
with lasting_output(), StopRequest() as stop:
    print("started", flush=True)
    while not stop.noted():
        time.sleep(0.01)
    for step in tqdm(range(3), file=sys.stdout):
        tqdm.write(f"step {step}")
        print("a line")
    open(sys.argv[1], "w").write("saved")
    stop.agree()
sys.exit(stop.exit_code)
"""


def test_a_run_whose_output_nobody_reads_any_more_saves(tmp_path):
    """As when Ctrl-C ends the `tee` behind it, or a terminal is closed: SIGHUP, then no reader."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.getcwd(),
        env={name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout.readline() == b"started\n"
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=100) == 128 + signal.SIGHUP
    assert (tmp_path / "file").read_text() == "saved"
