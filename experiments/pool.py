"""A pool of runs side by side, with one process and one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from experiments.results import SAMPLES, SAMPLES_FILE
from kepo.config import Config
from kepo.disk.durable import as_json, write_durably
from kepo.errors import KepoError
from kepo.run.metrics import read_metrics

Name = TypeVar("Name")


class Pool:
    """A pool of processes with one thread each; every task has a process of its own."""

    def __init__(self, jobs: int):
        self.jobs = jobs or os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when torch is imported
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self.jobs, mp_context=context, max_tasks_per_child=1)

    def map(self, function: Callable[..., object], arguments: Sequence[tuple], what: str) -> None:
        """Call ``function`` with each of the arguments, and show how many calls are done."""
        futures = [self._executor.submit(function, *args) for args in arguments]
        for future in tqdm(as_completed(futures), desc=what, total=len(futures), unit="model"):
            future.result()

    def train_all(
        self, configs: Mapping[Name, Config], keep: Callable[[Name], None], until: float
    ) -> dict[Name, str]:
        """Train runs one after the other, and call ``keep(run)`` as soon as one is done.

        No run starts after ``until``, by `time.monotonic`; those under way are ended. Shows the
        steps of all runs together. Returns what went wrong, by run: a run that fails leaves the
        others alone.
        """
        waiting = list(configs.items())
        pending: dict[Future, Name] = {}
        failed: dict[Name, str] = {}
        done = 0
        bar = tqdm(total=sum(c.steps for c in configs.values()), desc="compare", unit="step")
        while pending or (waiting and time.monotonic() < until):
            while waiting and len(pending) < self.jobs and time.monotonic() < until:
                run, config = waiting.pop(0)
                pending[self._executor.submit(train_quietly, config)] = run
            finished, _ = wait(pending, timeout=2.0, return_when="FIRST_COMPLETED")
            for future in finished:
                run = pending.pop(future)
                done += configs[run].steps
                if fault := _fault(future):
                    failed[run] = fault
                    tqdm.write(f"failed: {run}: {fault}")
                else:
                    keep(run)
                    left = len(waiting) + len(pending)
                    tqdm.write(f"done: {run}; {left} left")
            under_way = (_steps_done(Path(configs[run].run_dir)) for run in pending.values())
            bar.update(done + sum(under_way) - bar.n)
        bar.close()
        return failed

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _fault(future: Future) -> str:
    """Return what ended a run before its end; "" if nothing did."""
    error = future.exception()
    if isinstance(error, KepoError):
        return str(error)
    if error is not None:
        raise error
    code = future.result()
    return f"ended by a signal ({code}); run again to go on" if code else ""


def train_quietly(config: Config) -> int:
    """Train a run and sample from its last policy, in a process of its own; its output goes to
    log.txt in the run's folder."""
    from kepo.loop import train

    folder = Path(config.run_dir)
    with quiet(folder / "log.txt"):
        result = train(config)
        if result.exit_code == 0:
            assert result.checkpoint is not None, "the last step is always saved"
            right = samples(result.checkpoint, config)
            write_durably(folder / SAMPLES_FILE, as_json(right))
    return result.exit_code


def samples(policy: Path, config: Config) -> dict[str, str]:
    """Return by rendering, for each question in order, how many of a policy's samples are right."""
    from kepo.data.load import load_omnimedvqa
    from kepo.evaluation.answers import answers_of
    from kepo.models.sampling import SamplingParams
    from kepo.models.vlm import VLM
    from kepo.tasks.multiple_choice import MultipleChoice

    assert config.eval_data is not None
    examples, task = load_omnimedvqa(config.eval_data), MultipleChoice()
    params = SamplingParams(n=SAMPLES, max_tokens=config.max_completion_length, temperature=1.0)
    said = answers_of(
        VLM.load(policy), examples, task, params, seed=config.seed, batch_size=config.eval_batch
    )
    found: dict[str, str] = {}
    for example, some in zip(examples, said, strict=True):
        right = sum(task.is_right(one.text, example) for one in some)
        found[example.modality] = found.get(example.modality, "") + str(right)
    return found


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
