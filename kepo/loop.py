"""The training loop, top to bottom: sample, rescue, gate, ask the teacher, one fused loss, one
optimiser step.

    kepo train recipe.yaml --lr 1e-5  # flags override the file
    kepo train recipe.yaml dr_grpo    # and so does a preset, or another file
    torchrun --nproc-per-node=8 -m kepo train recipe.yaml

Re-running the same command after a crash, a kill or Ctrl-C resumes from the last checkpoint; on a
CPU, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kepo.check import check
from kepo.config import RECIPES, Config, load, presets
from kepo.data.example import Example
from kepo.data.run_data import with_own_data
from kepo.distributed.processes import all_gather, errors_end_all_ranks, on_rank0, world_size
from kepo.distributed.sharding import own_gradients, whole_tensor
from kepo.errors import KepoConfigError, KepoError
from kepo.flags import command_line
from kepo.models.reading import hide_transformers_bars
from kepo.objective.batch import Batch, collate
from kepo.objective.micros import lay_out
from kepo.objective.score import FrozenScores, score
from kepo.objective.step import kepo_step, with_old_logprobs
from kepo.objective.totals import StepTotals
from kepo.rollout.explore import explore
from kepo.rollout.models import Models
from kepo.rollout.questions import draw, from_data
from kepo.rollout.rollouts import demonstrations
from kepo.run.agreement import agreeing_ranks
from kepo.run.lock import exclusive
from kepo.run.metrics import completion_records, last_metrics, peak_gb, step_metrics, step_times
from kepo.run.milestones import (
    begin,
    draw_curves,
    is_measured,
    measure,
    save,
    saved_if_the_teacher_goes,
)
from kepo.run.open import Run, open_run
from kepo.run.progress import say, show, step_bar
from kepo.run.signals import StopRequest, lasting_output
from kepo.run.sinks.telling import Sink
from kepo.sections import ObjectiveConfig, OptimizerConfig
from kepo.tasks.environment import with_own
from kepo.tasks.rewards import Reward
from kepo.tasks.task import Task
from kepo.teachers.served import ServedTeacher
from kepo.teachers.several import each_of
from kepo.terminal import any_terminal


@dataclass(frozen=True)
class Result:
    """What has become of a run when `train` returns."""

    exit_code: int
    """0 when all steps are done; 128 plus the signal's number when a signal ended the run after
    saving: 130 for Ctrl-C, 143 for SIGTERM."""
    folder: Path
    """The run's folder, ``run_dir``."""
    checkpoint: Path | None
    """The policy in the newest checkpoint, to evaluate or to export; None if nothing was saved."""
    metrics: dict[str, Any]
    """What metrics.jsonl says of the last step, its evaluation included."""


def train(
    config: Config,
    *,
    task: Task | str | None = None,
    rewards: Sequence[str | Reward] | str | Reward | None = None,
    data: Iterable[Example | Mapping[str, Any]] | None = None,
    sinks: Sequence[Sink] | None = None,
) -> Result:
    """Run (or resume) the training that ``config`` describes.

    task, rewards: objects and functions, or names, in the places of those that the config names; a
    resumed run must be given them again. data: the questions in place of ``train_data``: a list of
    `Example`, or of records as a JSON Lines file has them. sinks: objects that are told what the
    run logs.
    It may be called in a notebook, in any thread, and again with another config; signals are only
    noted in the main thread. Errors are KepoError.
    Writes checkpoints, metrics.jsonl, data.json and curves.png under ``config.run_dir``. Every
    process of torchrun calls it; all see the whole of a step except for the micro-batches, which
    are divided among them (kepo.distributed.processes).
    """
    any_terminal()
    with errors_end_all_ranks():
        if not isinstance(config, Config):
            raise KepoConfigError(
                f"train: expected a kepo.Config, not {config!r}; kepo.load reads one"
            )
        config, env = with_own(config, task, rewards)
        config, own = with_own_data(config, data)
        check(config, env)
    hide_transformers_bars()
    with (
        lasting_output(),
        agreeing_ranks(config, env.code) as device,
        StopRequest() as stop,
        exclusive(Path(config.run_dir)),
    ):
        run = open_run(config, device, stop, env, own, sinks or ())
        if run is not None:
            with run.sinks, closing(run.models.sampler):
                take_steps(run)
                draw_curves(run)
        newest = None if run is None or run.newest is None else run.newest / "policy"
        folder = Path(config.run_dir)
        return Result(stop.exit_code, folder, newest, on_rank0(lambda: last_metrics(folder)))


def take_steps(run: Run) -> None:
    """Run the algorithm: all remaining steps, or those until a signal asks to stop."""
    config, models, stop = run.config, run.models, run.stop
    examples, log_every = run.data.train, config.log_completions_every
    begin(run)
    skipped = 0
    bar = step_bar(run.done, config.steps)
    for step in bar:
        if stop:
            break
        started = time.perf_counter()
        questions = draw(examples, config, step)
        own = len(questions) - from_data(config, step)
        given = demonstrations(models.policy.encoder, questions[own:], run.env, config)
        with saved_if_the_teacher_goes(run, step - 1):
            with models.sampler.ready():
                found = explore(questions[:own], models, run.env, config, run.hints, examples, step)
            explored = time.perf_counter()
            batch, totals = collate(found.groups, config, given), StepTotals()
            minis, wasted = lay_out(batch, models.policy, config)
            scores = ask(models, minis, config, totals)
        for norm in updates(run, step, minis, scores, totals):
            skipped = 0 if math.isfinite(norm) else skipped + 1
        ended = time.perf_counter()

        totals = totals.of_all_ranks()
        values = step_metrics(found, given, batch, totals, config) | {
            "grad_norm": norm,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "skipped": skipped,
            "kepo/padding": wasted,
            **step_times(found, totals, after_sampling=ended - explored, whole=ended - started),
            "mem/peak_gb": max(all_gather(peak_gb(run.device))),
        }
        run.write(step, values)
        if log_every and (step == 1 or step % log_every == 0):
            rollouts = [*itertools.chain(*found.groups), *given]
            run.write_completions(step, completion_records(rollouts, batch, config))
        show(bar, values)
        if skipped > config.max_skipped_steps:
            ids = [example.id for example in questions]
            raise KepoError(
                f"max_skipped_steps={config.max_skipped_steps}: {skipped} steps in a row had no "
                f"finite gradient; questions: {ids}"
            )

        stop.agree()
        if not stop and is_measured(step, config.steps, config.eval_every):
            measure(run, step)
            stop.agree()  # an evaluation may be long
        if stop or step == config.steps or step % config.save_every == 0:
            save(run, step)


def ask(
    models: Models, minis: Sequence[list[Batch]], config: ObjectiveConfig, totals: StepTotals
) -> list[list[FrozenScores]]:
    """Return what the frozen models say of this rank's micro-batches of each mini-batch; equally
    many on all ranks."""
    asked = [micro for micros in minis for micro in micros]
    scores = iter(score(models.teacher, models.ref, asked, config, totals))
    for teacher in each_of(models.teacher):
        if isinstance(teacher, ServedTeacher):
            requests, again = teacher.server.taken()
            totals.teacher_requests += requests
            totals.teacher_retries += again
    return [list(itertools.islice(scores, len(micros))) for micros in minis]


def updates(
    run: Run,
    step: int,
    minis: Sequence[list[Batch]],
    scores: list[list[FrozenScores]],
    totals: StepTotals,
) -> Iterator[float]:
    """Take the optimiser steps of a step: ``num_iterations`` passes over its mini-batches; yield
    the norm of each gradient. ``scores`` is what the frozen models say, as `ask` returns it."""
    models, config = run.models, run.config
    for micros in minis[1:]:  # they meet a policy that has been updated
        for place, micro in enumerate(micros):
            work = partial(with_old_logprobs, models.policy, micro, config, totals)
            micros[place] = models.policy.run_wrapped(work)
    for _ in range(config.num_iterations):
        for micros, theirs in zip(minis, scores, strict=True):
            add_gradients(models, micros, theirs, config, totals)
            yield update(run, step)
    scores.clear()  # a rollout needs the memory


def add_gradients(
    models: Models,
    micros: list[Batch],
    scores: Sequence[FrozenScores],
    config: ObjectiveConfig,
    totals: StepTotals,
) -> None:
    """Add the gradients of this rank's micro-batches, and add their statistics to ``totals``.

    After the first of several iterations, ``micros`` hold the log-probabilities from before any
    update, as those of later mini-batches do from the beginning.
    """
    policy = models.policy
    policy.model.train()
    for place, micro in enumerate(micros):
        work = partial(kepo_step, policy, models.teacher, micro, scores[place], config, totals)
        with own_gradients(policy.wrapper, last=place == len(micros) - 1):
            loss, logprobs = policy.run_wrapped(work)
            # Gradients are averaged over processes; the loss's weights are of the sum.
            (loss * world_size()).backward()
        if micro.old_logprobs is None and config.num_iterations > 1:
            micros[place] = replace(micro, old_logprobs=logprobs)
    policy.model.eval()


def update(run: Run, step: int) -> float:
    """Clip the gradients and step the optimiser, unless the gradients are not finite; return their
    norm."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.lr * lr_share(step, run.config)
    parameters = run.parameters.values()
    clipped = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm)
    norm = whole_tensor(clipped).item()
    if math.isfinite(norm):
        run.optimizer.step()
    else:
        say(f"step {step}: gradient norm is {norm}; the step is skipped")
    # A rollout needs their memory (DDP keeps its buckets).
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def lr_share(step: int, config: OptimizerConfig) -> float:
    """Return the share of ``lr`` at a step, which ``lr_schedule`` decides.

    step / warmup_steps                            up to step warmup_steps, and from there
    1                                              constant
    1 - (1 - lr_end) t                             linear
    lr_end + (1 - lr_end) (1 + cos(pi t)) / 2      cosine
    t = (step - warmup_steps) / (steps - warmup_steps)
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    form, end = config.decay
    if form == "constant":
        return 1.0
    passed = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    if form == "cosine":
        return end + (1.0 - end) * (1.0 + math.cos(math.pi * passed)) / 2.0
    return 1.0 - (1.0 - end) * passed


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo train``. Recipes and presets each override those before them; flags override them
    all."""
    layers = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    with errors_end_all_ranks():
        [config] = command_line(
            load(*layers),
            prog="kepo train",
            usage=RECIPES,
            args=arguments[len(layers) :],
            description=f"{__doc__}\nPresets: {', '.join(presets())}.",
        )
    return train(config).exit_code
