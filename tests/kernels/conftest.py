"""What the tests of the kernels share on top of tests/conftest.py."""

import pytest
import torch
from checks import device_of, rows_module, unavailable
from row_calls import BACK_ENDS, BackEnd


@pytest.fixture(autouse=True)
def one_thread():
    """On problems this small a second thread only makes the first one wait.

    Twenty times as long on a busy machine. Tests about threads set their own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACK_ENDS, ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}")
def back_end(request, monkeypatch) -> BackEnd:
    name, dtype = request.param
    impl, _, isa = name.partition("-")
    if reason := unavailable(impl):
        pytest.skip(f"{impl}: {reason}")
    rows = rows_module(impl)
    if isa:
        monkeypatch.setenv("KEPO_CPU_ISA", isa)
        try:
            rows.isa()
        except ValueError as error:
            pytest.skip(str(error))
    return BackEnd(rows, dtype, device_of(impl))


@pytest.fixture
def unpoisoned(monkeypatch):
    """Memory as it comes: poisoning it would allocate a second time."""
    monkeypatch.undo()


@pytest.fixture
def fresh_compiler():
    """torch.compile without graphs of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
