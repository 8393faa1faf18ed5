"""What the tests of the kernels share on top of tests/conftest.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """On problems this small a second thread only makes the first one wait.

    Twenty times as long on a busy machine. Tests about threads set their own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
