"""The only chunk loop; every loss runs in it.

    for rows in chunks:                                   rows of weight zero are in none of them
        logits, teacher logits <- two GEMMs               the second for rows that have a teacher
        table                  <- row_forward             logprob, divergence, entropy of each row
        c, g, e                <- d loss / d those three  autograd on vectors of length n
        dlogits                <- row_backward_           in place of the logits if of their dtype
        dhidden[rows], dlm_head, dbias <- GEMMs, fp32     over rows and columns that carry gradient

This module knows nothing of masks, gates, advantages or clipping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kepo_kernels.compute import forks, gemm, low_rank, pages
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.sparsity import LightColumns, keep_rows_, live_rows
from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import LoRA
from kepo_kernels.rows.contract import NUM_COEFFICIENTS, RowSettings, RowStats, accumulate_dtype
from kepo_kernels.rows.top_k_rows import TopK, TopKRows
from kepo_kernels.teachers import refuse_bad_tokens

Coefficients = Callable[[Tensor, Tensor], Tensor]  # (rows (n,), numbers (3, n)) -> (3, n)


class Student(NamedTuple):
    """The student's tensors, which may receive a gradient."""

    hidden: Tensor  # (N, H), or (B, T, H) where (N, H) would be a copy
    lm_head: Tensor  # (V, H)
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Gradients(NamedTuple):
    """Accumulators of the student's gradients; None for those not asked for, whose GEMMs never
    run."""

    hidden: Tensor | None
    lm_head: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    @classmethod
    def empty(
        cls, student: Student, needs: tuple[bool, ...], problem: "LinearProblem"
    ) -> "Gradients":
        dtype = gemm.gradient_dtype(student.lm_head.dtype)
        # grad_tol > 0: most rows of the head's will never be written.
        zeros = pages.zeros if problem.grad_tol == 0.0 else pages.untouched_zeros
        made = {name: zeros for name in cls._fields}
        if problem.active_rows.chunks and gemm.writes_first(student.lm_head.device):
            made["lm_head"] = pages.empty
        return cls(
            *(
                made[name](x.shape, dtype, x.device) if need and x is not None else None
                for name, x, need in zip(cls._fields, student, needs, strict=True)
            )
        )


class HalfScale:
    """A power of two by which fp16 dlogits are raised, before they are formed, to fit fp16's range.

    A mean over N tokens sends back 1/N, and a flat row of V columns makes 1/(N V) of it: 8e-10 at
    8192 x 151,936, where fp16 ends at 6e-8. Coefficients are raised until the largest of a chunk is
    about 2^8: that leaves 2^8 above it for a log-ratio of 100 at a temperature of 0.5, and 2^22
    below it for flat rows. The sums over chunks (of the head, its bias and its LoRA's second
    factor) follow the factor from chunk to chunk and are divided by it at the end; gradients of a
    chunk's rows are divided by it at once. A chunk is raised at most 2^40 times as far as any
    before it: a smaller one adds nothing to the sums, which stay in fp32's range. NaN and Inf are
    ignored and stay in their rows. All of it is fp32 and stays on the device.
    """

    SUMS = ("lm_head", "bias", "lora_b")

    def __init__(self):
        self.factor: Tensor | None = None
        self.lowest: Tensor | None = None

    @property
    def inverse(self) -> Tensor:
        assert self.factor is not None, "no chunk has been raised"
        return 1.0 / self.factor

    def raised(self, coefficients: Tensor, gradients: Gradients) -> Tensor:
        """Return the chunk's coefficients, times the factor that its dlogits then have."""
        finite = torch.where(coefficients.isfinite(), coefficients, 0.0)
        largest = finite.abs().amax().clamp(2.0**-60, 2.0**100)
        factor = torch.exp2(8.0 - torch.log2(largest).ceil())
        if self.factor is None or self.lowest is None:
            self.lowest = factor
        else:
            self.lowest = torch.minimum(self.lowest, factor)
            factor = torch.minimum(factor, self.lowest * 2.0**40)
            self._multiply(gradients, factor / self.factor)
        self.factor = factor
        return coefficients * factor

    def lower(self, gradients: Gradients) -> None:
        if self.factor is not None:
            self._multiply(gradients, self.inverse)

    def _multiply(self, gradients: Gradients, by: Tensor) -> None:
        for name in self.SUMS:
            if (x := getattr(gradients, name)) is not None:
                x.mul_(by)


@dataclass(frozen=True)
class ActiveRows:
    """The rows that take part, those with a teacher first: indices into the flattened (B * T)."""

    rows: Tensor  # (n,) int64
    teacher_rows: (
        Tensor  # (n_teacher,) int64: where rows[:n_teacher] stand in the teacher, and there
    )
    chunks: tuple[tuple[int, int], ...]  # [start, end) in `rows`; none holds both kinds of row
    found_rows: (
        Tensor  # `rows` on the device where they were found, perhaps the CPU, where reading is free
    )


@dataclass(frozen=True)
class LinearProblem:
    """One call, flattened: everything the chunk loop needs except the tensors with gradient."""

    function: str  # name of the public function, for error messages
    active_rows: ActiveRows
    targets: Tensor | None  # (N,)
    teacher_hidden: Tensor | None  # (M, H_t), or (B, T, H_t) as for the student
    teacher_lm_head: Tensor | None  # (V_t, H_t), cut to the shared rows, as are the next two
    teacher_bias: Tensor | None
    teacher_lora: LoRA | None
    top_k: TopK | None  # (M, K) each, in place of teacher_hidden
    settings: RowSettings
    lora_scale: float
    operand_dtype: torch.dtype  # of the student's states in products; may be wider than theirs
    logits_dtype: torch.dtype
    row_kernels: ModuleType
    chunk_rows: int
    strip_rows: int  # rows of the student's head upcast at a time, where upcasting is needed
    teacher_strip_rows: int
    grad_tol: float


class Swept(NamedTuple):
    """The results of a sweep, besides the gradients it added to."""

    numbers: Tensor  # (3, N)
    dropped: float  # share of sum |dlogits| in columns left out of the gradient products
    head_rows: Tensor | None  # rows of the head whose gradient may be non-zero; None = any


def sweep(
    student: Student,
    problem: LinearProblem,
    coefficients: Coefficients | None,
    gradients: Gradients | None,
) -> Swept:
    """Run the chunk loop; gradients that the coefficients send back are added to `gradients`."""
    settings = problem.settings
    hidden = student.hidden
    forks.in_use()
    numbers = hidden.new_zeros(
        NUM_COEFFICIENTS,
        hidden.shape[:-1].numel(),
        dtype=accumulate_dtype(problem.logits_dtype),
        requires_grad=False,
    )
    buffers = _Buffers(problem, hidden)
    light = LightColumns(problem.grad_tol, len(student.lm_head), hidden.device)
    scale = HalfScale() if buffers.gradient_dtype == torch.float16 else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start, end in problem.active_rows.chunks:
            rows = problem.active_rows.rows[start:end]
            x = _gather(problem, hidden, rows, "hidden", hidden.device).to(problem.operand_dtype)
            logits = buffers.get("student", len(rows), len(student.lm_head))
            head, bias = student.lm_head, student.bias
            gemm.project_(logits, x, head, bias, strip_rows=problem.strip_rows)
            low = None
            if student.lora_a is not None and student.lora_b is not None:
                ab = student.lora_a, student.lora_b
                low = low_rank.project_(logits, x, *ab, problem.lora_scale, problem.strip_rows)
            teacher = _teacher(problem, buffers, start, end, len(student.lm_head))
            kernels: Any = problem.row_kernels
            if isinstance(teacher, TopK):
                kernels = TopKRows(kernels)
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
            if scale is not None:
                back = scale.raised(back, gradients)
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
                _accumulate_(gradients, student, problem, *of_rows, columns, start == 0, scale)
    if scale is not None and gradients is not None:
        scale.lower(gradients)
    return Swept(numbers, light.share, light.kept)


def _teacher(
    problem: LinearProblem, buffers: "_Buffers", start: int, end: int, vocab: int
) -> Tensor | TopK | None:
    """Return the teacher's logits of these rows, or its K tokens; None if they have no teacher."""
    rows = problem.active_rows.teacher_rows[start:end]
    if len(rows) == 0:
        return None
    if problem.top_k is not None:
        listed = TopK(*(x[rows] for x in problem.top_k))
        refuse_bad_tokens(problem.function, listed, rows, vocab)
        return TopK(*(moved(x, buffers.device) for x in listed))
    states, head = problem.teacher_hidden, problem.teacher_lm_head
    assert states is not None and head is not None, "rows have a teacher"
    logits = buffers.get("teacher", len(rows), len(head))
    x = moved(_gather(problem, states, rows, "teacher_hidden", buffers.device), buffers.device)
    strip_rows = problem.teacher_strip_rows
    gemm.project_(logits, x, head, problem.teacher_bias, strip_rows=strip_rows)
    if problem.teacher_lora is not None:
        low_rank.project_(logits, x, *problem.teacher_lora, strip_rows)
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
    first: bool,
    scale: HalfScale | None,
) -> None:
    """Add a chunk's part to every gradient that was asked for; `columns` None = all columns.

    `first` is whether this is the first chunk; `scale` is the factor by which its dlogits are too
    large.
    """
    how = columns, problem.strip_rows
    dx = gemm.add_gradients_(
        gradients.lm_head, dlogits, student.lm_head, x, gradients.hidden is not None, *how, first
    )
    if gradients.bias is not None:
        gradients.bias.add_(dlogits.sum(0, dtype=gradients.bias.dtype))
    if dx is not None and gradients.hidden is not None:
        dx = dx.to(gradients.hidden.dtype)
    lora_scale: float | Tensor = problem.lora_scale
    if scale is not None:
        dx = None if dx is None else dx.mul_(scale.inverse)
        lora_scale = lora_scale * scale.inverse
    if low is not None and student.lora_a is not None and student.lora_b is not None:
        ab = student.lora_a, student.lora_b
        wanted = dx, gradients.lora_a, gradients.lora_b
        low_rank.add_gradients_(*wanted, dlogits, x, low, *ab, lora_scale, *how)
    if dx is not None and gradients.hidden is not None:
        gradients.hidden.view(-1, dx.shape[1])[rows] = dx


class _Buffers:
    """The logits of one chunk, allocated at the first use and reused by every chunk."""

    def __init__(self, problem: LinearProblem, hidden: Tensor):
        self.rows = max((end - start for start, end in problem.active_rows.chunks), default=0)
        self.dtype, self.device = problem.logits_dtype, hidden.device
        self.gradient_dtype = gemm.dlogits_dtype(problem.operand_dtype, self.dtype, self.device)
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.kept:
            self.kept[name] = pages.empty((self.rows, columns), dtype or self.dtype, self.device)
        return self.kept[name][:rows]

    def dlogits(self, logits: Tensor) -> Tensor:
        """Return where the logits' gradient goes: over them, or beside them if its dtype
        differs."""
        if self.gradient_dtype == self.dtype:
            return logits
        rows, columns = logits.shape
        return self.get("dlogits", rows, columns, self.gradient_dtype)


def _gather(
    problem: LinearProblem, states: Tensor, rows: Tensor, name: str, device: torch.device
) -> Tensor:
    """Return the states of these rows, where they are; `device` is where they are multiplied.

    NaN and Inf are refused if that is a CPU, where checking costs no synchronisation: the states'
    sum is finite only if each of them is.
    """
    x = (
        states[rows]
        if states.dim() == 2
        else states[rows // states.shape[1], rows % states.shape[1]]
    )
    if device.type == "cpu" and not x.sum(dtype=torch.float64).isfinite():
        bad = torch.isfinite(x).all(-1).logical_not().nonzero()
        if len(bad) == 0:
            return x
        raise KepoInputError(
            f"{problem.function}: {name} holds NaN or Inf in row {int(rows[int(bad[0])])} of its "
            "flattened sequence dimensions, which has a non-zero weight; mask it out, or find "
            "where it comes from"
        )
    return x
