"""Memory of large tensors on a CPU: kept for the next call, never in use twice, given back."""

import gc
import threading

import pytest
import torch

from kepo_kernels.compute import pages

CPU, FLOAT32 = torch.device("cpu"), torch.float32
SHAPE = (pages.LEAST_BYTES // 4 // 1024, 1024)


@pytest.fixture(autouse=True)
def nothing_kept():
    pages.release()
    yield
    pages.release()


def kept() -> list[int]:
    gc.collect()
    return [len(x) for x in pages._kept]


def test_freed_memory_is_used_again():
    x = pages.empty(SHAPE, FLOAT32, CPU)
    place = x.data_ptr()
    row = x.fill_(3.0)[5]
    del x
    assert kept() == [] and (row == 3.0).all()  # a view of it is alive
    del row
    assert kept() == [pages.LEAST_BYTES]
    again = pages.zeros(SHAPE, FLOAT32, CPU)
    assert again.data_ptr() == place and not again.any()


def test_never_in_use_twice():
    tensors = [pages.empty(SHAPE, FLOAT32, CPU).fill_(float(i)) for i in range(4)]
    assert [x.unique().item() for x in tensors] == [0.0, 1.0, 2.0, 3.0]


def test_other_sizes_are_given_back():
    x, y = (pages.empty((n * SHAPE[0], 1024), FLOAT32, CPU) for n in (1, 2))
    del x, y
    assert sorted(kept()) == [pages.LEAST_BYTES, 2 * pages.LEAST_BYTES]
    z = pages.empty((3 * SHAPE[0], 1024), FLOAT32, CPU)
    assert kept() == [] and z.shape == (3 * SHAPE[0], 1024)


def test_no_more_is_kept_than_said(monkeypatch):
    monkeypatch.setattr(pages, "KEPT_BYTES", 2 * pages.LEAST_BYTES)
    tensors = [pages.empty(SHAPE, FLOAT32, CPU) for _ in range(4)]
    tensors.clear()
    assert len(kept()) == 2
    pages.release()
    assert kept() == []


@pytest.mark.parametrize("kept_bytes", [pages.KEPT_BYTES, 0])
def test_untouched_zeros_are_zeros(monkeypatch, kept_bytes):
    monkeypatch.setattr(pages, "KEPT_BYTES", kept_bytes)
    pages.empty(SHAPE, FLOAT32, CPU).fill_(7.0)
    x = pages.untouched_zeros(SHAPE, torch.float32, CPU)
    assert not x.any() and x.add_(1).sum() == x.numel()


def test_small_ones_are_torchs_own():
    for make in (pages.empty, pages.zeros, pages.untouched_zeros):
        x = make((3, 5), torch.bfloat16, CPU)
        assert x.shape == (3, 5) and x.dtype == torch.bfloat16
    assert kept() == []
    assert not pages.zeros((0, 5), FLOAT32, CPU).numel()


def test_threads_do_not_share():
    """Many threads take and free at once; nobody sees another's numbers."""
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            x = pages.empty(SHAPE, FLOAT32, CPU).fill_(number)
            if not (x == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
