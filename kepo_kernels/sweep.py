"""The only chunk loop.

    for rows in chunks:                                   rows of weight zero are in none of them
        logits, teacher logits <- two GEMMs               the second for rows that have a teacher
        table                  <- row_forward             logprob, divergence, entropy of each row
        c, g, e                <- d loss / d those three  autograd on vectors of length n
        dlogits                <- row_backward_           in place of the logits if of their dtype
        dhidden[rows], dlm_head, dbias <- GEMMs, fp32     over rows and columns that carry gradient

Nothing here knows of masks, gates, advantages or clipping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kepo_kernels import gemm, lora, pages
from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import LoRA
from kepo_kernels.rows import NUM_COEFFICIENTS, RowSettings, RowStats, accumulate_dtype
from kepo_kernels.sparsity import LightColumns, keep_rows_, live_rows

Coefficients = Callable[[Tensor, Tensor], Tensor]  # (rows (n,), numbers (3, n)) -> (3, n)


class Student(NamedTuple):
    """The tensors that may receive a gradient."""

    hidden: Tensor  # (N, H)
    lm_head: Tensor  # (V, H)
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Gradients(NamedTuple):
    """Their accumulators: None for those nobody asked for, whose GEMMs are then never run."""

    hidden: Tensor | None
    lm_head: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    @classmethod
    def empty(cls, student: Student, needs: tuple[bool, ...], sparse: bool = False) -> "Gradients":
        """`sparse`: most rows of the head's will never be written (grad_tol > 0)."""
        dtype = gemm.gradient_dtype(student.lm_head.dtype)
        zeros = pages.untouched_zeros if sparse else pages.zeros
        return cls(
            *(
                zeros(x.shape, dtype, x.device) if need else None
                for x, need in zip(student, needs, strict=True)
            )
        )


@dataclass(frozen=True)
class RowPlan:
    """Which rows take part, those with a teacher first: indices into the flattened (B * T)."""

    rows: Tensor  # (n,) int64
    teacher_rows: Tensor  # (n_teacher,) int64: where rows[:n_teacher] stand in `teacher_hidden`
    chunks: tuple[tuple[int, int], ...]  # [start, end) in `rows`; none holds both kinds of row
    planned_rows: Tensor  # `rows`, perhaps on the CPU: where looking at them waits for nothing


@dataclass(frozen=True)
class LinearProblem:
    """One call, flattened: all that the chunk loop needs but the tensors with gradient."""

    function: str  # the public one, for error messages
    plan: RowPlan
    targets: Tensor | None  # (N,)
    teacher_hidden: Tensor | None  # (M, H_t)
    teacher_lm_head: Tensor | None  # (V_t, H_t), cut to the shared rows, as are the next two
    teacher_bias: Tensor | None
    teacher_lora: LoRA | None
    settings: RowSettings
    lora_scale: float
    logits_dtype: torch.dtype
    row_kernels: ModuleType
    chunk_rows: int
    strip_rows: int  # of the student's head that are upcast at a time, where they have to be
    teacher_strip_rows: int
    grad_tol: float


class Swept(NamedTuple):
    """What a sweep found, beside the gradients it added to."""

    numbers: Tensor  # (3, N)
    dropped: float  # share of sum |dlogits| in columns left out of the gradient products
    head_rows: Tensor | None  # rows of the head whose gradient is not 0; None: any may be


def sweep(
    student: Student,
    problem: LinearProblem,
    coefficients: Coefficients | None,
    gradients: Gradients | None,
) -> Swept:
    """The chunk loop; what the coefficients send back is added to `gradients`."""
    kernels, settings = problem.row_kernels, problem.settings
    hidden = student.hidden
    numbers = hidden.new_zeros(
        NUM_COEFFICIENTS,
        len(hidden),
        dtype=accumulate_dtype(problem.logits_dtype),
        requires_grad=False,
    )
    buffers = _Buffers(problem, hidden)
    light = LightColumns(problem.grad_tol, len(student.lm_head), hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, end in problem.plan.chunks:
            rows = problem.plan.rows[start:end]
            x = _gather(problem, hidden, rows, "hidden")
            logits = buffers.get("student", len(rows), len(student.lm_head))
            gemm.project_(logits, x, *student[1:3], strip_rows=problem.strip_rows)
            low = None
            if student.lora_a is not None:
                ab = student.lora_a, student.lora_b
                low = lora.project_(logits, x, *ab, problem.lora_scale, problem.strip_rows)
            teacher = _teacher_logits(problem, buffers, start, end)
            targets = None if problem.targets is None else problem.targets[rows]

            table = kernels.row_forward(logits, targets, teacher, settings)
            found = RowStats(*table.unbind(0))
            chunk = torch.stack((found.logprob, found.divergence, found.entropy))
            numbers[:, rows] = chunk
            if coefficients is None:
                continue
            back = coefficients(rows, chunk).contiguous()
            if gradients is None or (live := live_rows(back)).numel() == 0:
                continue
            dlogits = buffers.dlogits(logits)
            out = None if dlogits is logits else dlogits
            kernels.row_backward_(logits, targets, teacher, table, back, settings, out)

            if len(live) < len(rows):
                dlogits, live = keep_rows_(dlogits, live)
                x, rows = x[live], rows[live]
                low = None if low is None else low[live]
            for part in light.parts(len(rows)):
                columns = light.leave_out(dlogits[part])
                of_rows = dlogits[part], x[part], None if low is None else low[part], rows[part]
                _accumulate_(gradients, student, problem, *of_rows, columns)
    return Swept(numbers, light.share, light.kept)


def _teacher_logits(
    problem: LinearProblem, buffers: "_Buffers", start: int, end: int
) -> Tensor | None:
    rows = problem.plan.teacher_rows[start:end]
    if len(rows) == 0:
        return None
    logits = buffers.get("teacher", len(rows), len(problem.teacher_lm_head))
    x = _gather(problem, problem.teacher_hidden, rows, "teacher_hidden")
    strip_rows = problem.teacher_strip_rows
    gemm.project_(logits, x, problem.teacher_lm_head, problem.teacher_bias, strip_rows=strip_rows)
    if problem.teacher_lora is not None:
        lora.project_(logits, x, *problem.teacher_lora, strip_rows)
    return logits


def _accumulate_(
    gradients: Gradients,
    student: Student,
    problem: LinearProblem,
    dlogits: Tensor,
    x: Tensor,
    low: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
) -> None:
    """Adds a chunk's part to every gradient that was asked for; `columns` None = all of them."""
    how = columns, problem.strip_rows
    dx = gemm.add_gradients_(
        gradients.lm_head, dlogits, student.lm_head, x, gradients.hidden is not None, *how
    )
    if gradients.bias is not None:
        gradients.bias.add_(dlogits.sum(0, dtype=gradients.bias.dtype))
    dx = None if dx is None else dx.to(gradients.hidden.dtype)
    if low is not None:
        ab = student.lora_a, student.lora_b
        wanted = dx, gradients.lora_a, gradients.lora_b
        lora.add_gradients_(*wanted, dlogits, x, low, *ab, problem.lora_scale, *how)
    if dx is not None:
        gradients.hidden[rows] = dx


class _Buffers:
    """The logits of one chunk, allocated at the first use, reused by every chunk."""

    def __init__(self, problem: LinearProblem, hidden: Tensor):
        self.rows = max((end - start for start, end in problem.plan.chunks), default=0)
        self.dtype, self.device = problem.logits_dtype, hidden.device
        self.gradient_dtype = gemm.dlogits_dtype(hidden.dtype, self.dtype, self.device)
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.kept:
            self.kept[name] = pages.empty((self.rows, columns), dtype or self.dtype, self.device)
        return self.kept[name][:rows]

    def dlogits(self, logits: Tensor) -> Tensor:
        """Where their gradient goes: over them, or beside them if it is of another dtype."""
        if self.gradient_dtype == self.dtype:
            return logits
        return self.get("dlogits", *logits.shape, self.gradient_dtype)


def _gather(problem: LinearProblem, states: Tensor, rows: Tensor, name: str) -> Tensor:
    """The states of these rows.

    NaN and Inf are refused on a CPU, where looking costs no synchronisation: their sum is finite
    only if each of them is.
    """
    x = states[rows]
    if x.device.type == "cpu" and not x.sum(dtype=torch.float64).isfinite():
        bad = torch.isfinite(x).all(-1).logical_not().nonzero()
        if len(bad) == 0:
            return x
        raise KepoInputError(
            f"{problem.function}: {name} holds NaN or Inf in row {int(rows[int(bad[0])])} of its "
            "flattened sequence dimensions, which has a non-zero weight; mask it out, or find "
            "where it comes from"
        )
    return x
