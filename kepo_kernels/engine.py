"""The only chunk loop, and the two autograd functions around it.

    for rows in chunks:                                   rows of weight zero are in none of them
        logits, teacher logits <- two GEMMs               the second for rows that have a teacher
        table                  <- row_forward             logprob, divergence, entropy of each row
        c, g, e                <- d loss / d those three  autograd on vectors of length n
        dlogits                <- row_backward_           in place of the logits
        dhidden[rows], dlm_head, dbias <- GEMMs, fp32

A loss forms its gradients during forward, so the logits of a chunk never have to be seen again, and
backward only scales them (`FusedLoss`). Per-row numbers with an unknown upstream gradient recompute
the logits in backward (`RowNumbers`). Nothing here knows of masks, gates, advantages or clipping.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kepo_kernels import gemm
from kepo_kernels.errors import KepoInputError
from kepo_kernels.rows import NUM_COEFFICIENTS, RowStats, accumulate_dtype


class TokenStats(NamedTuple):
    """The three numbers of each token, fp32 (fp64 for fp64 inputs); 0 where it takes no part."""

    logprobs: Tensor
    divergence: Tensor
    entropy: Tensor


BLOCK_ELEMENTS = 1 << 21  # of a gradient scaled at once: its product is 8 MiB, and stays in cache

TokenLoss = Callable[[TokenStats, Tensor], Tensor]
Coefficients = Callable[[Tensor, Tensor], Tensor]  # (rows (n,), numbers (3, n)) -> (3, n)


@dataclass(frozen=True)
class RowPlan:
    """Which rows take part, those with a teacher first: indices into the flattened (B * T)."""

    rows: Tensor  # (n,) int64
    teacher_rows: Tensor  # (n_teacher,) int64: where rows[:n_teacher] stand in `teacher_hidden`


@dataclass(frozen=True)
class LinearProblem:
    """One call, flattened: all that the chunk loop needs but the three tensors with gradient."""

    function: str  # the public one, for error messages
    plan: RowPlan
    targets: Tensor | None  # (N,)
    teacher_hidden: Tensor | None  # (M, H_t)
    teacher_lm_head: Tensor | None  # (V_t, H_t), cut to the shared rows
    teacher_bias: Tensor | None
    beta: float
    temperature: float
    logits_dtype: torch.dtype
    row_kernels: ModuleType
    chunk_rows: int


def fused_loss(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, problem: LinearProblem, loss: TokenLoss
) -> tuple[Tensor, TokenStats]:
    """Sum of `loss` over the plan's rows, differentiable; and the detached numbers of all N."""
    wanted = torch.is_grad_enabled()
    total, numbers = FusedLoss.apply(hidden, lm_head, bias, problem, loss, wanted)
    return total, TokenStats(*numbers.unbind(0))


def row_numbers(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, problem: LinearProblem
) -> TokenStats:
    """The numbers of all N rows, differentiable one by one."""
    return TokenStats(*RowNumbers.apply(hidden, lm_head, bias, problem).unbind(0))


def _differentiable_once(backward: Callable) -> Callable:
    """Makes a backward with create_graph=True an error.

    torch's `once_differentiable` lets it pass where the upstream gradient is a constant and hands
    out constants in turn: a gradient penalty would silently have no effect.
    """

    @wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the losses of kepo_kernels are differentiable once: backward cannot run with "
                "create_graph=True; kepo_kernels.reference has the same losses in plain PyTorch"
            )
        return backward(ctx, *upstream)

    return checked


class FusedLoss(torch.autograd.Function):
    """hidden, lm_head, bias -> (sum of per-row losses, (3, N) numbers).

    Gradients are formed in forward.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, problem, loss, wanted):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)

        def coefficients(rows: Tensor, numbers: Tensor) -> Tensor:
            with torch.enable_grad():
                leaves = numbers.detach().requires_grad_()
                subtotal = loss(TokenStats(*leaves.unbind(0)), rows).sum(dtype=torch.float64)
                total.add_(subtotal.detach())
                if not subtotal.requires_grad:
                    return torch.zeros_like(numbers)
                return torch.autograd.grad(subtotal, leaves)[0]

        needs = [wanted and need for need in ctx.needs_input_grad[:3]]
        gradients = Gradients.empty(hidden, lm_head, bias, needs)
        numbers = _sweep(hidden, lm_head, bias, problem, coefficients, gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, lm_head, bias)]
        ctx.mark_non_differentiable(numbers)
        return total.to(numbers.dtype), numbers

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad_total, _grad_numbers):
        # New tensors: what was saved stays as it was, so a retained graph may be walked again.
        scaled = [
            None if x is None else _times(x, grad_total, dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in a new tensor of `dtype`, rounded once, with no other copy of x on the way."""
    out = torch.empty_like(x, dtype=dtype)
    rows = max(1, BLOCK_ELEMENTS // max(1, x[:1].numel()))
    # Reading the factor waits for nothing on a CPU, and spares a pass over the head when it is 1.
    plain = type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1.0
    for to, block in zip(out.split(rows), x.split(rows), strict=True):
        to.copy_(block if plain else block * factor.to(x.dtype))
    return out


class RowNumbers(torch.autograd.Function):
    """hidden, lm_head, bias -> (3, N) numbers.

    Backward recomputes the logits: nothing of size N x V is kept.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, problem):
        ctx.save_for_backward(hidden, lm_head, bias)
        ctx.problem = problem
        return _sweep(hidden, lm_head, bias, problem, None, Gradients(None, None, None))

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad_numbers):
        inputs = ctx.saved_tensors
        gradients = Gradients.empty(*inputs, ctx.needs_input_grad[:3])
        _sweep(*inputs, ctx.problem, lambda rows, _: grad_numbers[:, rows], gradients)
        cast = [
            None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)
        ]
        return *cast, None


class Gradients(NamedTuple):
    """Accumulators of the three gradients.

    None for those nobody asked for, whose GEMMs are then never run.
    """

    hidden: Tensor | None
    lm_head: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, hidden, lm_head, bias, needs) -> "Gradients":
        dtype = gemm.gradient_dtype(lm_head.dtype)
        return cls(
            *(
                torch.zeros(x.shape, dtype=dtype, device=x.device) if need else None
                for x, need in zip((hidden, lm_head, bias), needs, strict=True)
            )
        )


def _sweep(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    problem: LinearProblem,
    coefficients: Coefficients | None,
    gradients: Gradients,
) -> Tensor:
    """The chunk loop: numbers (3, N), and what the coefficients send back added to `gradients`."""
    dtype, kernels = problem.logits_dtype, problem.row_kernels
    backward = any(x is not None for x in gradients)
    numbers = hidden.new_zeros(
        NUM_COEFFICIENTS, len(hidden), dtype=accumulate_dtype(dtype), requires_grad=False
    )
    buffers = _Buffers(problem, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, teacher_rows in _chunks(problem):
            x = _finite(problem, hidden[rows], "hidden", rows)
            logits = buffers.student(len(rows), len(lm_head))
            gemm.project_(logits, x, lm_head, bias)
            teacher = None
            if teacher_rows is not None:
                teacher = buffers.teacher(len(rows), len(problem.teacher_lm_head))
                y = problem.teacher_hidden[teacher_rows]
                y = _finite(problem, y, "teacher_hidden", teacher_rows)
                gemm.project_(teacher, y, problem.teacher_lm_head, problem.teacher_bias)
            targets = None if problem.targets is None else problem.targets[rows]
            settings = (problem.beta, problem.temperature)

            table = kernels.row_forward(logits, targets, teacher, *settings)
            found = RowStats(*table.unbind(0))
            chunk = torch.stack((found.logprob, found.divergence, found.entropy))
            numbers[:, rows] = chunk
            if coefficients is None:
                continue
            back = coefficients(rows, chunk)
            if not backward:
                continue
            kernels.row_backward_(logits, targets, teacher, table, back.contiguous(), *settings)

            if gradients.hidden is not None:
                dx = gemm.hidden_gradient(logits, lm_head)
                gradients.hidden[rows] = dx.to(gradients.hidden.dtype)
            if gradients.lm_head is not None:
                gemm.accumulate_head_(gradients.lm_head, logits, x)
            if gradients.bias is not None:
                gradients.bias.add_(logits.sum(0, dtype=gradients.bias.dtype))
    return numbers


def _chunks(problem: LinearProblem) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks of equal length, rows with a teacher first. They depend on the active rows alone, so
    closing a sequence gives bit for bit what leaving it out gives."""
    rows, teacher_rows = problem.plan.rows, problem.plan.teacher_rows
    split = len(teacher_rows)
    for part, with_teacher in ((rows[:split], True), (rows[split:], False)):
        if len(part) == 0:
            continue
        count = -(-len(part) // problem.chunk_rows)
        size = -(-len(part) // count)
        for start in range(0, len(part), size):
            end = start + size
            yield part[start:end], teacher_rows[start:end] if with_teacher else None


class _Buffers:
    """The workspace: logits of one chunk, allocated at the first use, reused by every chunk."""

    def __init__(self, problem: LinearProblem, device: torch.device):
        self.rows = min(problem.chunk_rows, len(problem.plan.rows))
        self.dtype, self.device = problem.logits_dtype, device
        self.kept: dict[str, Tensor] = {}

    def _get(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self.kept:
            self.kept[name] = torch.empty(self.rows, columns, dtype=self.dtype, device=self.device)
        return self.kept[name][:rows]

    def student(self, rows: int, columns: int) -> Tensor:
        return self._get("student", rows, columns)

    def teacher(self, rows: int, columns: int) -> Tensor:
        return self._get("teacher", rows, columns)


def _finite(problem: LinearProblem, x: Tensor, name: str, rows: Tensor) -> Tensor:
    """Refuse NaN and Inf in rows that take part; on CPU, where looking costs no synchronisation."""
    if x.device.type == "cpu" and not torch.isfinite(x).all():
        row = rows[int(torch.isfinite(x).all(-1).logical_not().nonzero()[0])]
        raise KepoInputError(
            f"{problem.function}: {name} holds NaN or Inf in row {int(row)} of its flattened "
            "sequence dimensions, which has a non-zero weight; mask it out, or find where it comes "
            "from"
        )
    return x
