"""No more threads, no more memory, after a fork: in children of this process, which may be hurt."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import unavailable

import kepo_kernels
from kepo_kernels.compute import forks, pages
from kepo_kernels.rows.contract import RowSettings

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
SETTINGS = RowSettings(0.5, 0.7, 1.0, 0.0, 0.0)


def in_child(work: Callable[[], str], seconds: int = 20) -> str:
    """What `work` returns in a forked child, or the error it raises; its death is a failure."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the child, should it hang
        signal.alarm(seconds)
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child died; it had said {answer!r}"
    return answer


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("allowed", [0, 2])
def test_no_more_threads(allowed, monkeypatch):
    """The rows of threads that the system refuses are done by those there are: the same bits."""
    if reason := unavailable("cpu"):
        pytest.skip(reason)
    from kepo_kernels.rows import cpu_rows

    logits, teacher = torch.randn(2, 60, 20000).unbind(0)
    targets, back = torch.randint(20000, (60,)), torch.randn(3, 60)
    table = cpu_rows.row_forward(logits, targets, teacher, SETTINGS)
    dlogits = logits.clone()
    cpu_rows.row_backward_(dlogits, targets, teacher, table, back, SETTINGS)

    def work() -> str:
        # Of the rows alone: torch's own threads would end the process in libgomp.
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        refuse_threads(allowed)
        mine = cpu_rows.row_forward(logits, targets, teacher, SETTINGS)
        cpu_rows.row_backward_(logits, targets, teacher, mine, back, SETTINGS)
        return str(torch.equal(mine, table) and torch.equal(logits, dlogits))

    assert in_child(work) == "True"


def refuse_threads(allowed: int) -> None:
    """Of this user, who has `allowed` of them left; root has no such limit, so it becomes another.

    Threads that end are replaced: the limit is on those that live at a time.
    """
    if os.geteuid() == 0:
        resource.setrlimit(resource.RLIMIT_NPROC, (1 + allowed, 1 + allowed))
        os.setuid(61234)
    else:
        living = sum(p.stat().st_uid == os.geteuid() for p in Path("/proc").glob("[0-9]*"))
        resource.setrlimit(resource.RLIMIT_NPROC, (living + allowed, living + allowed))


# ------------------------------------------------------------------------------------------- memory


def large_call(trains: str) -> None:
    """A head of one row in memory: its gradient would be 4 GiB, the logits of a chunk 1 GiB."""
    head = torch.ones(1, 256).expand(4_000_000, 256).requires_grad_(trains == "lm_head")
    hidden = torch.randn(64, 256).requires_grad_(trains == "hidden")
    ids = torch.arange(64)
    kepo_kernels.fused_grpo_loss(hidden, head, ids, torch.randn(64), chunk_rows=64).backward()


def small_call() -> float:
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (4, 50))
    loss = kepo_kernels.fused_grpo_loss(hidden, head, torch.arange(4), torch.arange(4.0))
    loss.backward()
    return float(loss.detach() + hidden.grad.sum() + head.grad.sum())


@pytest.mark.parametrize("trains", ["lm_head", "hidden"])
def test_memory_that_cannot_be_had(trains):
    """Torch's own error, and the next call that fits works."""
    expected = small_call()

    def work() -> str:
        lines = Path("/proc/self/status").read_text().splitlines()
        size = int(next(x for x in lines if x.startswith("VmSize")).split()[1]) << 10
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), hard))
        try:
            large_call(trains)
        except RuntimeError as error:
            said = str(error)
        return f"{small_call() == expected} {said}"

    answer = in_child(work)
    assert answer.startswith("True") and "can't allocate memory" in answer


def test_pages_that_cannot_be_had_are_asked_of_torch(monkeypatch):
    """And what was kept for the next call is given back first."""
    cpu, shape = torch.device("cpu"), (pages.LEAST_BYTES // 4, 1)
    del (kept := [pages.empty(shape, torch.float32, cpu)])[:]

    def none(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", none)
    larger = (2 * shape[0], 1)
    for make in (pages.empty, pages.zeros, pages.untouched_zeros):
        assert make(larger, torch.float32, cpu).shape == larger
    assert not pages.zeros(larger, torch.float32, cpu).any() and not pages._kept and not kept
    monkeypatch.setattr(pages, "KEPT_BYTES", 0)
    assert not pages.untouched_zeros(larger, torch.float32, cpu).any()


# ------------------------------------------------------------------------------------- after a fork


@pytest.fixture
def two_threads():
    before, used = torch.get_num_threads(), forks._threads_used
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    forks._threads_used = used


def test_a_fork_after_a_call_computes_with_one_thread(two_threads):
    """Plain torch would hang there, and so would the gradient that is added to another."""
    hidden, head = torch.randn(200, 64), torch.randn(5000, 64)
    ids, advantages = torch.randint(5000, (200,)), torch.randn(200)

    def step() -> tuple[float, float]:
        leaf = head.clone().requires_grad_()
        for _ in range(2):
            kepo_kernels.fused_grpo_loss(hidden, leaf, ids, advantages).backward()
        return float(leaf.grad.double().sum()), float((hidden @ head.T).double().sum())

    expected = step()
    here = torch.get_num_threads()
    answer = in_child(lambda: f"{torch.get_num_threads()} {step() == pytest.approx(expected)}")
    assert answer == "1 True"
    assert torch.get_num_threads() == here == 2


def test_a_fork_before_any_call_keeps_its_threads(two_threads):
    forks._threads_used = False
    assert in_child(lambda: str(torch.get_num_threads())) == "2"


def test_a_single_thread_needs_no_care(two_threads):
    torch.set_num_threads(1)
    forks._threads_used = False
    small_call()
    assert not forks._threads_used
