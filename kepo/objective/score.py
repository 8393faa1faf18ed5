"""What the frozen models say about the completions of a step: they are asked once, before the
update, however many micro-batches and iterations then read it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kepo.distributed.processes import any_rank, errors_on_all_ranks
from kepo.models.encoding import Prompt
from kepo.models.vlm import CPU, VLM
from kepo.objective.batch import Batch
from kepo.objective.first_error import distilled_tokens
from kepo.objective.totals import StepTotals
from kepo.sections import ObjectiveConfig
from kepo.teachers.said import laid_out
from kepo.teachers.served import ServedTeacher
from kepo.teachers.several import Teachers, each_of
from kepo_kernels import TopK, fused_linear_logprobs
from kepo_kernels.compute.devices import moved


@dataclass(frozen=True)
class FrozenScores:
    """What the frozen models say about one micro-batch; None where one is not asked."""

    teacher_hidden: Tensor | TopK | None = None
    """(open, T, H) teacher's states of the completions that are distilled on, in their order; of a
    teacher behind a server its likeliest tokens, (open, T, K)."""
    teacher_logprobs: Tensor | None = None
    """(open, T) fp32 teacher's log-probabilities of their tokens; with ``step_weights`` only."""
    distilled: Tensor | None = None
    """(B, T) bool, on the CPU: the tokens that `distilled_tokens` leaves. A completion that has
    none of them is not among the teacher's states. None if ``distill_tokens`` is all."""
    ref_logprobs: Tensor | None = None
    """(B, T) fp32 reference's log-probabilities of all completions' tokens."""
    odd: tuple[str, ...] = ()
    """The models among them whose states are not finite."""

    def to(self, device: torch.device) -> FrozenScores:
        tensors = {n: x for n, x in vars(self).items() if isinstance(x, Tensor) and n != _ON_HOST}
        there: dict[str, Any] = {name: moved(x, device) for name, x in tensors.items()}
        if isinstance(self.teacher_hidden, TopK):
            there["teacher_hidden"] = TopK(*(moved(x, device) for x in self.teacher_hidden))
        return replace(self, **there)


_ON_HOST = "distilled"  # it decides which rows exist, and is read without waiting


def score(
    teachers: Teachers,
    ref: VLM | None,
    micros: Sequence[Batch],
    config: ObjectiveConfig,
    totals: StepTotals,
) -> list[FrozenScores]:
    """Ask teachers and reference about this rank's micro-batches, of which each has one teacher.

    A teacher is asked only about sequences whose gate is open; with every gate closed it is not
    asked, unless it is sharded and another rank has open ones. Its time and tokens are added to
    ``totals``. All ranks call. Raises KepoTeacherError on all of them if a server does not answer
    one of them.
    """
    nothing = [FrozenScores()] * len(micros)
    taught = nothing
    for place, teacher in enumerate(each_of(teachers) if config.distils else ()):
        opened = [_opened(micro, place) for micro in micros]
        asked = [
            _Asked.among(micro, places, micro.teacher_prompts)
            for micro, places in zip(micros, opened, strict=True)
        ]
        device = CPU if isinstance(teacher, ServedTeacher) else teacher.device
        started = _now(device)
        if isinstance(teacher, ServedTeacher):
            found = _served_scores(teacher, asked, config)
        else:
            found = _teacher_scores(teacher, micros, asked, config)
        totals.teacher_seconds += _now(device) - started
        totals.teacher_tokens += sum(int(one.mask.sum()) for one in asked)
        pairs = zip(taught, found, asked, strict=True)
        taught = [new if one.prompts else old for old, new, one in pairs]
    kept = nothing if ref is None else [_ref_scores(ref, micro, config) for micro in micros]
    return [
        replace(t, ref_logprobs=r.ref_logprobs, odd=t.odd + r.odd)
        for t, r in zip(taught, kept, strict=True)
    ]


def softmax(config: ObjectiveConfig) -> dict[str, Any]:
    """Return the settings by which every call of the kernels reads logits, and the
    implementation."""
    return dict(
        temperature=config.temperature,
        impl=config.impl,
        workspace_bytes=config.workspace_bytes,
        logits_dtype=config.logits_dtype and getattr(torch, config.logits_dtype),
    )


@torch.no_grad()
def logprobs_of(
    model: VLM,
    states: Tensor,
    ids: Tensor,
    mask: Tensor,
    config: ObjectiveConfig,
    temperature: float | None = None,
) -> Tensor:
    """Score the ids: (B, T) log-probabilities where the mask is, 0 elsewhere. ``states`` and
    ``ids`` are on the model's device; the mask may be on the CPU. temperature: None = the
    student's."""
    how = softmax(config) | ({} if temperature is None else dict(temperature=temperature))
    found = fused_linear_logprobs(states, model.head, ids, completion_mask=mask, **how)
    assert isinstance(found, Tensor)  # entropies were not asked for
    return found


def finite(states: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
    """Return states (B, T, H) that the losses take, and whether they were finite as they came.

    On a CPU the losses check this, and would end the run; on a GPU they do not, and their result is
    NaN by itself.
    """
    if states.is_cuda or bool(states.detach().sum(-1, dtype=torch.float64).isfinite()[mask].all()):
        return states, True
    return states.nan_to_num(0.0, 0.0, 0.0), False


class _Asked(NamedTuple):
    """Completions of one micro-batch that a model is asked about."""

    prompts: list[Prompt]
    ids: Tensor
    mask: Tensor
    among_all: Tensor
    """(B,) bool, True for these completions among those of the micro-batch."""

    @classmethod
    def among(cls, micro: Batch, places: Sequence[int], given: Sequence[Prompt]) -> _Asked:
        """Return the completions at these places, each with its prompt among those that are
        given."""
        prompts = [given[place] for place in places]
        chosen = torch.zeros(len(micro), dtype=torch.bool)
        chosen[places] = True
        return cls(prompts, micro.completion_ids[places], micro.completion_mask[places], chosen)


def _opened(micro: Batch, place: int) -> list[int]:
    """Return the places of the completions that this teacher is asked about."""
    return (micro.opened & (micro.teacher == place)).nonzero().squeeze(-1).tolist()


def _served_scores(
    teacher: ServedTeacher, asked: Sequence[_Asked], config: ObjectiveConfig
) -> list[FrozenScores]:
    """Ask a server about all of them at once; it answers for each completion."""
    prompts = [prompt for one in asked for prompt in one.prompts]
    tokens = [
        ids[mask].tolist() for one in asked for ids, mask in zip(one.ids, one.mask, strict=True)
    ]
    with errors_on_all_ranks():
        said = iter(teacher.say(prompts, tokens))
    found = []
    for one in asked:
        own = list(itertools.islice(said, len(one.prompts)))
        if not own:
            found.append(FrozenScores())
            continue
        law, logprobs = laid_out(own, one.ids.shape[1])
        found.append(_cut(FrozenScores(law, logprobs), one, config))
    return found


def _teacher_scores(
    teacher: VLM, micros: Sequence[Batch], asked: Sequence[_Asked], config: ObjectiveConfig
) -> list[FrozenScores]:
    # A teacher that is kept in host memory comes to the device once, for all of them.
    together = len(micros) if config.teacher_placement == "offload" else 1
    found: list[FrozenScores] = []
    for first in range(0, len(micros), together):
        some = asked[first : first + together]
        distils = any(one.prompts for one in some)
        if teacher.collective and any_rank(distils) and not distils:
            # For those who need this rank's share of it.
            _states(teacher, [_Asked.among(micros[first], [0], micros[first].prompts)])
        states = _states(teacher, some) if distils else [None] * len(some)
        for one, hidden in zip(some, states, strict=True):
            found.append(_kept(teacher, one, hidden, config))
    return found


def _kept(
    teacher: VLM, asked: _Asked, hidden: Tensor | None, config: ObjectiveConfig
) -> FrozenScores:
    """Return what is kept of the teacher's states of a micro-batch until its loss is computed."""
    if hidden is None or not asked.prompts:
        return FrozenScores()
    hidden, good = finite(hidden, asked.mask)
    logprobs = None
    if config.step_weights or config.distill_tokens != "all":
        ids = asked.ids.to(hidden.device)
        asked_at = config.teacher_temperature
        logprobs = logprobs_of(teacher, hidden, ids, asked.mask, config, asked_at)
    scores = _cut(FrozenScores(hidden, logprobs, odd=() if good else ("teacher",)), asked, config)
    kept = scores.teacher_hidden
    if isinstance(kept, Tensor) and kept.is_cuda and config.scores_on == "host":
        host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        scores = replace(scores, teacher_hidden=host.copy_(kept, non_blocking=True))  # see `_now`
    return scores


def _cut(scores: FrozenScores, asked: _Asked, config: ObjectiveConfig) -> FrozenScores:
    """Return what a teacher said without what the loss does not read: completions of which
    ``distill_tokens`` leaves no token, and log-probabilities that served to find this out."""
    law, logprobs = scores.teacher_hidden, scores.teacher_logprobs
    if config.distill_tokens != "all":
        assert law is not None and logprobs is not None
        own = distilled_tokens(logprobs.cpu(), asked.mask, config)
        left = own.any(-1)
        distilled = torch.zeros(len(asked.among_all), own.shape[1], dtype=torch.bool)
        distilled[asked.among_all] = own
        scores = replace(scores, distilled=distilled)
        if not left.any():
            return replace(scores, teacher_hidden=None, teacher_logprobs=None)
        if not left.all():
            law = TopK(*(x[left] for x in law)) if isinstance(law, TopK) else law[left]
            scores = replace(scores, teacher_hidden=law, teacher_logprobs=logprobs[left])
    return scores if config.step_weights else replace(scores, teacher_logprobs=None)


def _ref_scores(ref: VLM, micro: Batch, config: ObjectiveConfig) -> FrozenScores:
    asked = _Asked.among(micro, range(len(micro)), micro.prompts)
    hidden, good = finite(_states(ref, [asked])[0], asked.mask)
    ids = asked.ids.to(hidden.device)
    logprobs = logprobs_of(ref, hidden, ids, asked.mask, config)
    return FrozenScores(ref_logprobs=logprobs, odd=() if good else ("reference",))


@torch.no_grad()
def _states(model: VLM, asked: Sequence[_Asked]) -> list[Tensor]:
    """Return the model's states (B, T, H) of each, from one forward for all of them."""
    width = max(one.ids.shape[1] for one in asked)
    prompts = [prompt for one in asked for prompt in one.prompts]
    ids, mask = (
        torch.cat([F.pad(x, (0, width - x.shape[1])) for x in each])
        for each in ([one.ids for one in asked], [one.mask for one in asked])
    )
    hidden = model.run_wrapped(lambda: model.completion_states(prompts, ids, mask))
    parts = hidden.split([len(one.prompts) for one in asked])
    return [part[:, : one.ids.shape[1]] for part, one in zip(parts, asked, strict=True)]


def _now(device: torch.device) -> float:
    """Return the time in seconds, after all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
