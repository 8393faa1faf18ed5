"""A pool of runs side by side, with one process and one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from experiments.results import Run
from kepo.config import Config
from kepo.errors import KepoError
from kepo.run.metrics import read_metrics


class Pool:
    """A pool of processes with one thread each; every task has a process of its own."""

    def __init__(self, jobs: int):
        jobs = jobs or os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when torch is imported
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)

    def map(self, function: Callable[..., object], arguments: Sequence[tuple]) -> None:
        for future in [self._executor.submit(function, *args) for args in arguments]:
            future.result()

    def train_all(
        self, configs: dict[Run, Config], steps: int, keep: Callable[[Run], None]
    ) -> None:
        """Train each run to its end, and call ``keep(run)`` as soon as it is done.

        Shows the steps of all runs together.
        """
        pending: dict[Future, Run] = {
            self._executor.submit(train_quietly, config): run for run, config in configs.items()
        }
        done, bar = 0, tqdm(total=steps * len(configs), desc="compare", unit="step")
        while pending:
            finished, _ = wait(pending, timeout=2.0, return_when="FIRST_COMPLETED")
            for future in finished:
                run = pending.pop(future)
                if code := future.result():
                    raise KepoError(f"{run} was ended by a signal ({code}); run again to go on")
                keep(run)
                done += steps
                tqdm.write(f"done: seed {run[0]}, {run[1]}")
            under_way = (_steps_done(Path(configs[run].run_dir)) for run in pending.values())
            bar.update(done + sum(under_way) - bar.n)
        bar.close()

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def train_quietly(config: Config) -> int:
    """Train a run, in a process of its own; its output goes to log.txt in the run's folder."""
    from kepo.loop import train

    with quiet(Path(config.run_dir) / "log.txt"):
        return train(config).exit_code


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Append what is printed meanwhile to the file ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _steps_done(run_dir: Path) -> int:
    return max((record["step"] for record in read_metrics(run_dir / "metrics.jsonl")), default=0)
