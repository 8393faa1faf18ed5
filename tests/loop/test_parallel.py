"""Work shared out over processes, and decisions they take together."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kepo import parallel
from kepo.errors import KepoConfigError
from kepo.parallel import any_of, by_first, share_of, shared_out, together

ITEMS = list(range(7))


def in_twos(share):
    return [share[start : start + 2] for start in range(0, len(share), 2)]


def test_alone_every_function_does_the_obvious():
    assert (parallel.rank(), parallel.world_size(), parallel.is_first()) == (0, 1, True)
    assert together("x") == ["x"] and any_of(True) and not any_of(False)
    assert by_first(lambda: 3) == 3 and share_of(ITEMS) == ITEMS
    done = []

    def work(some):
        done.append(list(some))
        return [x * x for x in some]

    assert shared_out(ITEMS, work, in_twos) == [x * x for x in ITEMS]
    assert done == [[0, 1], [2, 3], [4, 5], [6]]
    assert shared_out([], work, in_twos) == []
    with pytest.raises(KepoConfigError, match="no"):
        by_first(functools.partial(refuse, "no"))


def no_disk():
    raise OSError("disk is full")


def refuse(text):
    raise KepoConfigError(text)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_even_and_make_the_whole(monkeypatch, world):
    monkeypatch.setattr(parallel, "world_size", lambda: world)
    shares = [share_of(ITEMS, place) for place in range(world)]
    assert [x for share in shares for x in share] == ITEMS
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def in_each_of_two(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    assert together(rank) == [0, 1] and parallel.is_first() == (rank == 0)
    assert any_of(rank == 1) and not any_of(False)
    made = []
    assert by_first(lambda: made.append(rank) or "made") == "made"
    assert made == [0][: 1 - rank]
    for _ in range(2):  # an error leaves both able to go on together
        with pytest.raises(KepoConfigError, match="first said no"):
            by_first(lambda: refuse("first said no"))

    with pytest.raises(OSError, match="disk is full"):
        by_first(no_disk)

    done = []

    def work(some):
        done.append(list(some))
        return [x + 0.5 for x in some]

    # 7 items: 3 and 4, so 2 portions in both; 5 in portions of 1: 2 and 3, so one repeats one.
    assert shared_out(ITEMS, work, in_twos) == [x + 0.5 for x in ITEMS]
    assert done == [[[0, 1], [2]], [[3, 4], [5, 6]]][rank]
    done.clear()
    apart = [[x] for x in range(5)]
    found = shared_out(range(5), work, lambda share: [[x] for x in share], in_step=True)
    assert found == [x + 0.5 for x in range(5)]
    assert done == [[*apart[:2], apart[0]], apart[2:]][rank]
    # One item: the other process helps with it, and its help is not counted.
    done.clear()
    assert shared_out([9], work, in_twos, in_step=True) == [9.5] and done == [[9]]
    dist.destroy_process_group()


def test_two_processes_agree_and_share(tmp_path):
    mp.start_processes(in_each_of_two, args=(tmp_path / "store",), nprocs=2, start_method="spawn")


def test_a_group_of_one_is_made_where_it_is_needed():
    with parallel.processes("cpu") as device:
        assert device == torch.device("cpu") and not dist.is_initialized()
    with parallel.processes("cpu", alone=True):
        assert dist.is_initialized() and parallel.world_size() == 1
        with parallel.processes("cpu"):
            pass
        assert dist.is_initialized()  # it was not the inner one's to end
    assert not dist.is_initialized()
    with pytest.raises(KepoConfigError), parallel.processes("cpu", alone=True):
        refuse("no")
    assert not dist.is_initialized()
