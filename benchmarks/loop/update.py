"""One update of the loop, with what it takes and leaves: the teacher's scores, `kepo_step` and
backward over the micro-batches of a step, then clipping and AdamW; and one rollout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import kepo.objective.step
import kepo_kernels
from benchmarks.loop import whole
from benchmarks.loop.gauge import Gauge
from benchmarks.loop.problem import Problem
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.objective.batch import Batch
from kepo.objective.micros import own_micros, plan_micros
from kepo.objective.score import score
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals
from kepo.rollout.rollouts import sample
from kepo.tasks.environment import environment_of

UNFELT = 1e-20  # a weight next to which the others, about 1e-3, round to themselves
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Relative, of loss and gradients: sums in another order, in bf16 through all layers' rounding."""
WARM_UP_TOKENS = 4  # of a rollout


class Mismatch(Exception):
    """Two ways that ought to do the same do not."""


# ---- ways to one gradient ----


def as_it_is(batch: Batch) -> Batch:
    return batch


class AllRead(Batch):
    """A batch whose closed sequences the teacher reads, too."""

    @property
    def opened(self) -> Tensor:
        return torch.ones_like(super().opened)


def all_states(batch: Batch) -> Batch:
    """Every sequence read, the weights of closed ones still 0: the loss drops those rows."""
    return AllRead(**vars(batch))


def everything(batch: Batch) -> Batch:
    """No weight 0: the loss computes rows that nobody feels."""
    weights = batch.distill_weights.clamp(min=UNFELT) * batch.completion_mask
    return replace(batch, distill_weights=weights)


class Way(NamedTuple):
    batch: Callable[[Batch], Batch]
    loss: Callable


WAYS = {
    "fused": Way(as_it_is, kepo_kernels.fused_kepo_loss),
    "states": Way(all_states, kepo_kernels.fused_kepo_loss),
    "everywhere": Way(everything, kepo_kernels.fused_kepo_loss),
    "whole": Way(as_it_is, whole.kepo_loss),
}


# ---- an update ----


class Taken(NamedTuple):
    """By a phase, once."""

    seconds: float
    held_mib: float
    """Before it."""
    peak_mib: float
    reserved_mib: float | None

    @property
    def above_mib(self) -> float:
        return self.peak_mib - self.held_mib


class Update(NamedTuple):
    """What one update left behind."""

    loss: float
    gradient_norm: float
    teacher_tokens: int
    """Completion tokens that the teacher's backbone was given."""
    expected_tokens: int
    phases: dict[str, Taken]
    gradient_gap: float = float("nan")
    """Relative, to the way that was first at this gate rate."""


# ---- all of it ----


class Bench:
    """A problem, and what is needed to update it again and again."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        """folder: for gradients, which beside the models would count as held."""
        self.problem, self.folder = problem, folder
        self.gauge = Gauge(problem.policy.device)
        self.trained = {n: p for n, p in problem.policy.model.named_parameters() if p.requires_grad}
        # A rate of 0, so that every update begins from the same weights.
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.0)
        for parameter in self.trained.values():  # AdamW's state, as earlier steps leave it
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.clear()
        self.truths: dict[float, tuple[Path, Update]] = {}
        """By gate rate, what was first and its gradients."""
        self.seen: list[tuple[int, float]] = []
        """Tokens of each of the teacher's forwards, and the most held during it."""
        self.before: list[float] = []
        """The most held before each."""
        self._watch(problem.teacher)

    def _watch(self, teacher: VLM) -> None:
        backbone = teacher.completion_states

        def watched(prompts: Sequence[Prompt], ids: Tensor, mask: Tensor) -> Tensor:
            self.before.append(self.gauge.most())
            states = backbone(prompts, ids, mask)
            self.seen.append((int(mask.sum()), self.gauge.most()))
            return states

        teacher.completion_states = watched

    def standing_mib(self) -> float:
        """Both models, and AdamW's state."""
        models = (self.problem.policy.model, self.problem.teacher.model)
        tensors = [tensor for model in models for tensor in model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors) / 2**20

    def now(self) -> float:
        """Seconds, after all that the device was given to do."""
        if self.gauge.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def clear(self) -> None:
        """No gradients, also where an update did not come to its end."""
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, rate: float, way: str, gradients: Path | None = None) -> Update:
        """An update, from the same weights as any other. gradients: a file for them; what is free
        is given back before such an update."""
        problem, (change, loss_of_way) = self.problem, WAYS[way]
        config, totals, loss = problem.config, StepTotals(), 0.0
        batch = change(problem.batch(rate))
        problem.policy.model.train()
        held = self.gauge.settle() if gradients else 0.0
        self.seen.clear()
        self.before.clear()
        started = self.now()
        with mock.patch.object(kepo.objective.step, "fused_kepo_loss", loss_of_way):
            policy, teacher = problem.policy, problem.teacher
            lengths = policy.encoder.lengths(batch.prompts)
            micros = own_micros(batch, plan_micros(batch, lengths, config, policy.share_prompts))
            scores = score(teacher, None, micros, config, totals)
            for micro, known in zip(micros, scores, strict=True):
                part, _ = kepo_step(policy, teacher, micro, known, config, totals)
                part.backward()
                loss += float(part.detach())
        updated = self.now()
        taught = max((peak for _, peak in self.seen), default=held)
        peak, reserved = max([*self.before, taught, self.gauge.most()]), self.gauge.reserved()
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), config.max_grad_norm))
        self.optimizer.step()
        phases = {
            "update": Taken(updated - started, held, peak, reserved),
            "teacher": Taken(totals.teacher_seconds, held, taught, reserved),
            "optimiser": Taken(self.now() - updated, held, self.gauge.most(), reserved),
        }
        if gradients:
            found = {n: p.grad if p.grad is None else p.grad.cpu() for n, p in self.trained.items()}
            torch.save(found, gradients)
        self.clear()
        expected = int(batch.completion_mask[batch.opened].sum())
        return Update(loss, norm, sum(n for n, _ in self.seen), expected, phases)

    def first(self, rate: float, way: str) -> Update:
        """The first update of a way. Mismatch if its loss or its gradients are not those of the way
        before it at this rate, or if the teacher read other than it should have."""
        file = self.folder / f"{rate:g}-{way}.pt"
        mine = self.update(rate, way, file)
        if mine.teacher_tokens != mine.expected_tokens:
            raise Mismatch(
                f"at gate rate {rate:g} {way} gave the teacher {mine.teacher_tokens} completion "
                f"tokens; expected {mine.expected_tokens}"
            )
        truth_file, truth = self.truths.setdefault(rate, (file, mine))
        gap = gradient_gap(file, truth_file)
        tolerance = TOLERANCE[self.problem.policy.head.weight.dtype]
        # The policy term is the mean of advantages, 0 up to rounding: its loss has no scale.
        same = math.isclose(mine.loss, truth.loss, rel_tol=tolerance, abs_tol=tolerance / 10)
        if not same or not gap <= tolerance:
            raise Mismatch(
                f"at gate rate {rate:g} {way} has the loss {mine.loss:.7g} and gradients off by "
                f"{gap:.1e}, {truth_file.stem} the loss {truth.loss:.7g}; expected the same"
            )
        return mine._replace(gradient_gap=gap)

    # ---- a rollout ----

    def rollout(self) -> tuple[Taken, int]:
        """Sampling a step's completions as the loop does, and how many tokens they have."""
        problem, config = self.problem, self.problem.config
        env, count = environment_of(config), config.num_generations
        problem.policy.model.eval()
        few = replace(config, max_completion_length=WARM_UP_TOKENS)
        sample(problem.policy, problem.examples, env, few, num_generations=count)
        held, started = self.gauge.settle(), self.now()
        groups = sample(problem.policy, problem.examples, env, config, num_generations=count)
        taken = Taken(self.now() - started, held, self.gauge.most(), self.gauge.reserved())
        return taken, sum(len(rollout.completion_ids) for group in groups for rollout in group)


def gradient_gap(mine: Path, truth: Path) -> float:
    """Relative difference of all gradients together, |mine - truth| / |truth|."""
    mine, truth = (torch.load(path, mmap=True) for path in (mine, truth))
    if mine.keys() != truth.keys() or any((mine[n] is None) != (truth[n] is None) for n in truth):
        raise Mismatch("other parameters have gradients in one way than in the other")
    both = [(mine[name], g) for name, g in truth.items() if g is not None]
    off = math.hypot(*(float((a - b).norm()) for a, b in both))
    return off / math.hypot(*(float(b.norm()) for _, b in both))
