"""Work shared out over processes, and decisions they take together."""

import functools
import os

import pytest
import several
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kepo.distributed import processes
from kepo.distributed.processes import (
    Stopped,
    all_gather,
    any_rank,
    errors_on_all_ranks,
    on_rank0,
    rank_slice,
    split_work,
)
from kepo.errors import KepoConfigError, KepoError

ITEMS = list(range(7))


def in_twos(share):
    return [share[start : start + 2] for start in range(0, len(share), 2)]


def test_alone_every_function_does_the_obvious():
    assert (processes.rank(), processes.world_size(), processes.is_rank0()) == (0, 1, True)
    assert all_gather("x") == ["x"] and any_rank(True) and not any_rank(False)
    assert on_rank0(lambda: 3) == 3 and rank_slice(ITEMS) == ITEMS
    done = []

    def work(some):
        done.append(list(some))
        return [x * x for x in some]

    assert split_work(ITEMS, work, in_twos) == [x * x for x in ITEMS]
    assert done == [[0, 1], [2, 3], [4, 5], [6]]
    assert split_work([], work, in_twos) == []
    with pytest.raises(KepoConfigError, match="no"):
        on_rank0(functools.partial(refuse, "no"))


def no_disk():
    raise OSError("disk is full")


def refuse(text):
    raise KepoConfigError(text)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_even_and_make_the_whole(monkeypatch, world):
    monkeypatch.setattr(processes, "world_size", lambda: world)
    shares = [rank_slice(ITEMS, place) for place in range(world)]
    assert [x for share in shares for x in share] == ITEMS
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def in_each_of_two(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    assert all_gather(rank) == [0, 1] and processes.is_rank0() == (rank == 0)
    assert any_rank(rank == 1) and not any_rank(False)
    made = []
    assert on_rank0(lambda: made.append(rank) or "made") == "made"
    assert made == [0][: 1 - rank]
    for _ in range(2):  # an error leaves both able to go on together
        with pytest.raises(KepoConfigError, match="first said no"):
            on_rank0(lambda: refuse("first said no"))

    with pytest.raises(OSError, match="disk is full"):
        on_rank0(no_disk)

    done = []

    def work(some):
        done.append(list(some))
        return [x + 0.5 for x in some]

    # 7 items: 3 and 4, so 2 portions in both; 5 in portions of 1: 2 and 3, so one repeats one.
    assert split_work(ITEMS, work, in_twos) == [x + 0.5 for x in ITEMS]
    assert done == [[[0, 1], [2]], [[3, 4], [5, 6]]][rank]
    done.clear()
    apart = [[x] for x in range(5)]
    found = split_work(range(5), work, lambda share: [[x] for x in share], collective=True)
    assert found == [x + 0.5 for x in range(5)]
    assert done == [[*apart[:2], apart[0]], apart[2:]][rank]
    # One is asked to stop: so do both.
    for collective in (False, True):
        with pytest.raises(processes.Stopped):
            split_work(ITEMS, work, in_twos, collective=collective, stop=lambda: rank == 1)
        assert all_gather("here") == ["here", "here"]
    done.clear()

    # One cannot work, or not finish: both learn it, and go on together.
    def fails(some):
        return refuse("it is gone") if rank == 1 and 5 in some else list(some)

    def unfinished(results):
        return refuse("no end") if rank == 0 else results

    with pytest.raises(KepoConfigError, match="it is gone"):
        split_work(ITEMS, fails, in_twos)
    with pytest.raises(KepoConfigError, match="no end"):
        split_work(ITEMS, work, in_twos, finish=unfinished)
    with pytest.raises(KepoConfigError, match="mine"), errors_on_all_ranks():
        if rank == 1:
            refuse("mine")
    with errors_on_all_ranks():
        assert all_gather("here") == ["here", "here"]
    # One item: the other process helps with it, and its help is not counted.
    done.clear()
    assert split_work([9], work, in_twos, collective=True) == [9.5] and done == [[9]]
    dist.destroy_process_group()


def test_two_processes_agree_and_share(tmp_path):
    mp.start_processes(in_each_of_two, args=(tmp_path / "store",), nprocs=2, start_method="spawn")


def ends_with_an_error(rank, ports):
    launch = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0])
    os.environ.update({name: str(value) for name, value in launch.items()})
    # Of both at once: a group that is left there aborts the end of some processes.
    with pytest.raises(KepoConfigError, match="no"), processes.processes("cpu"):
        assert all_gather(rank) == [0, 1]
        refuse("no")
    assert not dist.is_initialized()
    # Of one, while the other waits for it.
    os.environ["MASTER_PORT"] = str(ports[1])
    ends = (r"rank 0: another process of this run has ended", "no")
    with pytest.raises(KepoError, match=ends[rank]), processes.processes("cpu"):
        all_gather(rank)
        if rank == 1:
            refuse("no")
        all_gather(rank)
    assert not dist.is_initialized()


def test_after_an_error_no_group_is_left():
    with several.free_port() as first, several.free_port() as second:
        pass
    mp.start_processes(ends_with_an_error, args=((first, second),), nprocs=2, start_method="spawn")


def test_a_group_of_one_is_made_where_it_is_needed():
    with processes.processes("cpu") as device:
        assert device == torch.device("cpu") and not dist.is_initialized()
    with processes.processes("cpu", alone=True):
        assert dist.is_initialized() and processes.world_size() == 1
        with processes.processes("cpu"):
            pass
        assert dist.is_initialized()  # it was not the inner one's to end
    assert not dist.is_initialized()
    with pytest.raises(KepoConfigError), processes.processes("cpu", alone=True):
        refuse("no")
    assert not dist.is_initialized()


# ---- what makes a process one of several ----

LAUNCH = ("RANK", "LOCAL_RANK", *processes.LAUNCH)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and clears the others."""

    def set_to(**given):
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


WHOLE = dict(RANK="1", WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(WORLD_SIZE="1"),
        dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"),
        dict(MASTER_ADDR="head", MASTER_PORT="29500"),
        dict(RANK="3", LOCAL_RANK="3"),
        dict(WORLD_SIZE=""),
        WHOLE | dict(WORLD_SIZE="1", RANK="0"),
    ],
)
def test_what_a_scheduler_sets_for_one_process_is_one_process(environment, given):
    environment(**given)
    assert processes.launched() == 1
    with processes.processes("cpu"):
        assert not dist.is_initialized()


def test_torchruns_variables_are_several(environment):
    environment(**WHOLE)
    assert processes.launched() == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(WORLD_SIZE="4"), r"WORLD_SIZE=4, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({**WHOLE, "MASTER_ADDR": ""}, "torchrun --nproc-per-node=4"),
        ({**WHOLE, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4; expected a rank below it"),
        ({**WHOLE, "RANK": "first"}, "RANK='first'; expected a number"),
        ({**WHOLE, "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'; expected a number"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE='two'; expected a number"),
    ],
)
def test_half_a_launch_is_refused_with_a_remedy(environment, given, message):
    environment(**given)
    with pytest.raises(KepoConfigError, match=message), processes.processes("cpu"):
        pass


def test_a_process_takes_the_device_of_its_place(environment, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(LOCAL_RANK="1")  # set by a scheduler, and nobody else is there
    assert processes._own_device("cuda", several=False) == torch.device("cuda:0")
    assert processes._own_device("cuda", several=True) == torch.device("cuda:1")
    assert processes._own_device("cuda:1", several=False) == torch.device("cuda:1")
    assert taken == [0, 1, 1]
    environment(LOCAL_RANK="2")
    with pytest.raises(KepoConfigError, match=r"LOCAL_RANK=2, .* sees 2 CUDA devices; .*node=2"):
        processes._own_device("cuda", several=True)
    with pytest.raises(KepoConfigError, match="device='cuda:7', but"):
        processes._own_device("cuda:7", several=False)
    environment()
    with pytest.raises(KepoConfigError, match="LOCAL_RANK is not set"):
        processes._own_device("cuda", several=True)


def test_a_rank_that_does_not_come_is_named(environment):
    store = dist.HashStore()
    store.set("here/2", "")
    assert processes._late(store, 0, 4, 0.3) == [1, 3]
    assert processes.ranks([1, 3, 4]) == "ranks 1, 3-4" and processes.ranks([2]) == "rank 2"
    with several.free_port() as port:
        environment(**{**WHOLE, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with (
        pytest.raises(KepoError, match=r"rank 0: the 4 processes .* not all met .*0\.01 minutes"),
        processes.processes("cpu", timeout=0.6),
    ):
        pass
    assert not dist.is_initialized()


# ---- work that ends early ----


def test_work_that_is_asked_to_stop_ends_at_a_portion():
    done = []

    def work(some):
        done.extend(some)
        return some

    with pytest.raises(Stopped):
        split_work(ITEMS, work, in_twos, stop=lambda: len(done) >= 4)
    assert done == ITEMS[:4]
    assert split_work(ITEMS, work, in_twos, stop=lambda: False) == ITEMS
