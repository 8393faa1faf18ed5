"""The head: log-probabilities, entropies and the divergence from a teacher by one product."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kepo_kernels.compute.autograd import TokenStats, row_numbers
from kepo_kernels.compute.call import begin
from kepo_kernels.compute.graph_breaks import breaks_graph
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.validate import Engine


class OfTeacher(NamedTuple):
    """What verl's engines look for in a model's output as `fused_linear_aux`: (1, N) each."""

    distillation_losses: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


@dataclass(eq=False)
class TeacherTokens:
    """A micro-batch's teacher, packed as the student's states are."""

    top_k: TopK  # (1, N, K)
    distilled: Tensor  # (1, N) bool: positions that predict a token of the response
    beta: float
    answer: OfTeacher | None = None
    """What the head has computed of it."""


_TEACHER: ContextVar[TeacherTokens | None] = ContextVar("teacher", default=None)


@contextmanager
def teaching(teacher: TeacherTokens | None) -> Iterator[None]:
    """Have the head compute the divergence from a teacher, too."""
    before = _TEACHER.set(teacher)
    try:
        yield
    finally:
        _TEACHER.reset(before)


def teacher_now() -> TeacherTokens | None:
    """Return the teacher of the micro-batch that runs."""
    return _TEACHER.get()


class KepoFusedLinear(nn.Module):
    """It has the signatures of verl's FusedLinearForPPO; entropies are float32 where verl's are of
    the states' dtype."""

    engine: ClassVar[Engine] = {}
    """Engine settings of every call; see `kepo_kernels.losses`."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()  # chunks have the size that fits our workspace, and the kernels are ours

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log q(token) and entropy of every row (B, T) or (N,), both differentiable."""
        teacher = teacher_now()
        if teacher is not None and teacher.distilled.shape != input_ids.shape:
            teacher = None  # rows with padding, whose engine would not read the answer
        numbers = _numbers(
            hidden_states, vocab_weights, input_ids, temperature, teacher, dict(self.engine)
        )
        if teacher is not None:
            # The student's mass is no by-product of our kernels; nothing of ours reads it.
            mass = teacher.top_k.logprobs.exp().sum(-1)
            nothing = torch.zeros_like(numbers.divergence)
            teacher.answer = OfTeacher(numbers.divergence, nothing, mass.to(nothing))
        return numbers.logprobs, numbers.entropy


@breaks_graph("KepoFusedLinear")
def _numbers(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    teacher: TeacherTokens | None,
    engine: dict[str, Any],
) -> TokenStats:
    """Return the numbers of all rows, of shape (B, T) or (N,)."""
    call = begin("KepoFusedLinear", hidden, weight, None, None, engine)
    of_teacher = call.check.softmax(temperature)
    _, active = call.weights(None, weights=None, reduction="sum")
    call.check.targets(targets, call.hidden, active, len(call.head.weight))
    given: dict = {}
    if teacher is not None:
        top_k = TopK(*(x.to(hidden.device) for x in teacher.top_k))
        checked = call.teacher(top_k, None, None, None, of_teacher, None)
        given = dict(teacher=checked, distilled=teacher.distilled.to(active.device))
        given["beta"] = teacher.beta
    numbers = row_numbers(*call.problem(targets, active, temperature=temperature, **given))
    return TokenStats(*(x.reshape(call.lead) for x in numbers[:3]))
