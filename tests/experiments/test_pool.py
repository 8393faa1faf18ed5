"""The pool of a comparison: a run after the other until the time is up, failures apart."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from experiments import pool as module
from experiments.pool import Pool
from kepo.errors import KepoError


class AtOnce:
    """Runs what is submitted in place, and notes it."""

    def __init__(self, *args, **kwargs):
        self.ran = []

    def submit(self, function, config):
        self.ran.append(config.run_dir)
        future: Future = Future()
        try:
            future.set_result(config.does())
        except KepoError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", AtOnce)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # which it sets
        monkeypatch.setenv(name, "1")
    return Pool(1)


def config(tmp_path, name, does=lambda: 0):
    return SimpleNamespace(run_dir=str(tmp_path / name), steps=2, does=does)


def test_no_run_starts_after_the_time(pool, tmp_path, monkeypatch):
    clock = iter((0.0, 0.0, 50.0, 50.0, 120.0, 120.0, 120.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    kept = []
    assert pool.train_all({n: config(tmp_path, n) for n in "abcd"}, kept.append, until=100.0) == {}
    assert kept == ["a", "b"]


def test_a_failure_leaves_the_others(pool, tmp_path):
    def broken():
        raise KepoError("no finite gradient")

    configs = {"a": config(tmp_path, "a", broken), "b": config(tmp_path, "b", lambda: 143)}
    kept = []
    until = time.monotonic() + 60
    failed = pool.train_all(configs | {"c": config(tmp_path, "c")}, kept.append, until)
    assert kept == ["c"] and failed["a"] == "no finite gradient"
    assert failed["b"].startswith("ended by a signal (143)")


def test_map_calls_with_each_and_counts(pool, capsys):
    called = []

    def make(folder, seed):
        if seed == 9:
            raise KepoError(f"no memory in {folder}")
        called.append(seed)

    pool._executor = ThreadPoolExecutor(2)
    pool.map(make, [("root", 1), ("root", 2), ("root", 3)], "students")
    assert sorted(called) == [1, 2, 3]
    assert "students: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown
    with pytest.raises(KepoError, match="no memory in root"):
        pool.map(make, [("root", 9)], "students")
