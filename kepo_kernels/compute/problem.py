"""Conversion of a caller's arguments to the chunk loop's `LinearProblem`.

It decides which rows take part, and in which chunks.
"""

from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from kepo_kernels.compute import gemm
from kepo_kernels.compute.chunks import Sizes, chunk_length, gpu_at_hand
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.sparsity import live_rows
from kepo_kernels.compute.sweep import ActiveRows, LinearProblem, Student
from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import Head, LoRA
from kepo_kernels.rows import torch_rows
from kepo_kernels.rows.contract import RowSettings
from kepo_kernels.rows.dispatch import pick_rows
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.teachers import StatesTeacher, Teacher, TopKTeacher
from kepo_kernels.validate import Engine, Validator


@dataclass(frozen=True, eq=False)
class Request:
    """The request of a call to the chunk loop.

    `active` and `distilled` are bool of shape lead: the tokens that take part, and those among them
    that have a teacher (None: none do). With both on the CPU the host does not wait for a GPU.
    """

    check: Validator
    hidden: Tensor  # (B, T, H) or (N, H)
    head: Head
    bias: Tensor | None
    engine: Engine
    targets: Tensor | None
    active: Tensor
    teacher: Teacher | None
    distilled: Tensor | None
    beta: float
    temperature: float


def build_problem(asked: Request) -> tuple[Student, LinearProblem]:
    """Find the active rows and fix every setting of the chunk loop."""
    check, hidden, head, teacher = asked.check, asked.hidden, asked.head, _states(asked)
    rows, teacher_rows = _rows(asked)
    # If every gate is closed, the chunks are exactly those of a call without a teacher.
    shared = 0
    if teacher is not None and len(teacher_rows):
        shared = min(len(head.weight), len(teacher.head.weight))
    targets = asked.targets
    if targets is not None:
        # Targets of inactive tokens are never read; the kernels take int64.
        targets = targets.reshape(-1).to(torch.int64)
    dtypes = _operand_dtypes(asked)
    operand_dtype = gemm.operand_dtype(dtypes)
    logits_dtype = _logits_dtype(asked, operand_dtype)
    grad_tol = _grad_tol(asked)
    workspace_bytes = asked.engine.get("workspace_bytes")
    try:
        row_kernels = pick_rows(asked.engine.get("impl", "auto"), hidden.device, logits_dtype)
        sizes = Sizes(
            rows=len(rows),
            hidden_size=hidden.shape[-1],
            vocab=len(head.weight),
            dtype=min(dtypes, key=lambda x: x.itemsize),
            mixed=len(dtypes) > 1,
            logits_dtype=logits_dtype,
            device=hidden.device,
            teacher_rows=len(teacher_rows),
            teacher_hidden_size=teacher.hidden.shape[-1] if teacher is not None and shared else 0,
            shared_vocab=shared,
            top_k=asked.teacher.top_k.ids.shape[-1]
            if isinstance(asked.teacher, TopKTeacher)
            else 0,
            tokens=asked.active.numel(),
            lora_rank=0 if head.lora is None else len(head.lora.a),
            torch_impl=row_kernels is torch_rows,
            compacts=grad_tol > 0.0,
            **gpu_at_hand(hidden.device),
        )
        chunk_rows = chunk_length(sizes, workspace_bytes, asked.engine.get("chunk_rows"))
        strip_bytes = sizes.strip_bytes(workspace_bytes)
    except KepoInputError as error:
        check.refuse(str(error))
    chunks = even_chunks(len(teacher_rows), len(rows), chunk_rows)
    there, teacher_there = moved(rows, hidden.device), teacher_rows
    if asked.teacher is not None:
        teacher_there = moved(teacher_rows, asked.teacher.tensor.device)
    return student_of(hidden, head, asked.bias), LinearProblem(
        function=check.function,
        active_rows=ActiveRows(there, teacher_there, chunks, rows),
        targets=targets,
        **_teacher_tensors(teacher, shared),
        top_k=_flat_top_k(asked.teacher),
        settings=_row_settings(asked),
        lora_scale=1.0 if head.lora is None else float(head.lora.scale),
        operand_dtype=operand_dtype,
        logits_dtype=logits_dtype,
        row_kernels=row_kernels,
        chunk_rows=chunk_rows,
        strip_rows=sizes.strip_rows(sizes.hidden_size, strip_bytes),
        teacher_strip_rows=sizes.strip_rows(sizes.teacher_hidden_size, strip_bytes),
        grad_tol=grad_tol,
    )


def _states(asked: Request) -> StatesTeacher | None:
    """Return the teacher if it is one of hidden states."""
    return asked.teacher if isinstance(asked.teacher, StatesTeacher) else None


def _flat_top_k(teacher: Teacher | None) -> TopK | None:
    if not isinstance(teacher, TopKTeacher):
        return None
    return TopK(*(x.detach().flatten(0, -2) for x in teacher.top_k))


def _rows(asked: Request) -> tuple[Tensor, Tensor]:
    """Return the rows of the flattened student that take part, those with a teacher first, and
    where the latter stand in the flattened teacher."""
    active = asked.active.reshape(-1)
    if asked.teacher is None or asked.distilled is None:
        rows = active.nonzero().squeeze(-1)
        return rows, rows[:0]
    distilled = asked.distilled.reshape(-1) & active
    with_teacher = distilled.nonzero().squeeze(-1)
    rows = torch.cat((with_teacher, (active & ~distilled).nonzero().squeeze(-1)))
    return rows, asked.teacher.rows(with_teacher, asked.hidden.shape[:-1])


def _operand_dtypes(asked: Request) -> set[torch.dtype]:
    """Collect the dtypes of all operands of the products."""
    operands = [asked.hidden, *_tensors(asked.head, asked.bias)]
    if (teacher := _states(asked)) is not None:
        operands += [teacher.hidden, *_tensors(teacher.head, teacher.bias)]
    return {x.dtype for x in operands}


def _logits_dtype(asked: Request, operand_dtype: torch.dtype) -> torch.dtype:
    wanted = asked.engine.get("logits_dtype")
    asked.check.logits_dtype(wanted, operand_dtype)
    return wanted or gemm.default_logits_dtype(operand_dtype, asked.hidden.device)


def _grad_tol(asked: Request) -> float:
    grad_tol, device = float(asked.engine.get("grad_tol", 0.0)), asked.hidden.device
    asked.check.require(
        grad_tol == 0.0 or device.type == "cpu",
        f"grad_tol={grad_tol} with tensors on {device}: columns are left out on a CPU only, "
        "where that saves time; leave grad_tol out, or pass 0",
    )
    return grad_tol


class _TeacherTensors(TypedDict):
    """The teacher's side of a `LinearProblem`."""

    teacher_hidden: Tensor | None
    teacher_lm_head: Tensor | None
    teacher_bias: Tensor | None
    teacher_lora: LoRA | None


def _teacher_tensors(teacher: StatesTeacher | None, shared: int) -> _TeacherTensors:
    """Return the teacher's tensors detached, and cut to the shared vocabulary."""
    if teacher is None:
        return _TeacherTensors(
            teacher_hidden=None, teacher_lm_head=None, teacher_bias=None, teacher_lora=None
        )
    return _TeacherTensors(
        teacher_hidden=_flat(teacher.hidden.detach()),
        teacher_lm_head=teacher.head.weight.detach()[:shared],
        teacher_bias=None if teacher.bias is None else teacher.bias.detach()[:shared],
        teacher_lora=_shared(teacher.head.lora, shared),
    )


def _row_settings(asked: Request) -> RowSettings:
    """Fix the numbers of the row kernels.

    A scale s is a temperature 1/s: softmax(s z / T), and s z capped at c is s (z capped at c / s).
    """
    # Numbers may be numpy scalars or 0-d tensors; the kernels need Python numbers.
    head, teacher = asked.head, _states(asked)
    own_scale = float(head.logit_scale)
    scale = 1.0 if teacher is None else float(teacher.head.logit_scale)
    return RowSettings(
        beta=float(asked.beta),
        temperature=float(asked.temperature) / own_scale,
        teacher_temperature=1.0 if teacher is None else teacher.temperature / scale,
        softcap=float(head.softcap or 0.0) / own_scale,
        teacher_softcap=0.0 if teacher is None else float(teacher.head.softcap or 0.0) / scale,
    )


def _tensors(head: Head, bias: Tensor | None) -> list[Tensor]:
    given = (head.weight, bias, *(() if head.lora is None else head.lora[:2]))
    return [x for x in given if x is not None]


def student_of(hidden: Tensor, head: Head, bias: Tensor | None) -> Student:
    a, b = (None, None) if head.lora is None else head.lora[:2]
    return Student(_flat(hidden), head.weight, bias, a, b)


def _flat(states: Tensor) -> Tensor:
    """Return (..., H) as (N, H), or as it is where that would copy (a slice of longer
    sequences)."""
    if states.dim() == 3 and states.stride(0) != states.shape[1] * states.stride(1):
        return states
    return states.flatten(0, -2)


def _shared(lora: LoRA | None, shared: int) -> LoRA | None:
    return (
        None if lora is None else LoRA(lora.a.detach(), lora.b.detach()[:shared], float(lora.scale))
    )


def even_chunks(split: int, rows: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Split into chunks [start, end) of equal length, on either side of the split. They depend on
    the active rows alone, so closing a sequence gives the same bits as leaving it out."""
    chunks = []
    for begin, stop in ((0, split), (split, rows)):
        count = -(-(stop - begin) // longest)
        size = -(-(stop - begin) // max(1, count))
        chunks += [(start, min(start + size, stop)) for start in range(begin, stop, max(1, size))]
    return tuple(chunks)


def restricted(problem: LinearProblem, upstream: Tensor) -> LinearProblem:
    """Return the problem of the rows alone whose upstream gradient, (3, N), is not 0.

    On a GPU that is the whole problem: looking would make the host wait.
    """
    here = problem.active_rows
    live = live_rows(upstream[:, here.rows])
    if len(live) == len(here.rows):
        return problem
    split = int((live < len(here.teacher_rows)).sum())
    active_rows = ActiveRows(
        here.rows[live],
        here.teacher_rows[live[:split]],
        even_chunks(split, len(live), problem.chunk_rows),
        here.found_rows[live],
    )
    return replace(problem, active_rows=active_rows)


def whole_sequence_chunks(
    active_rows: ActiveRows, tokens: int, longest: int
) -> tuple[tuple[int, int], ...] | None:
    """Split into chunks that never cut a sequence of `tokens` tokens; None if one is too long.

    None also if a sequence has rows on both sides of the teacher's split: no chunk holds both.
    """
    if len(active_rows.rows) == 0:
        return ()
    of_row, split = active_rows.found_rows // tokens, len(active_rows.teacher_rows)
    sequence, counts = of_row.unique_consecutive(return_counts=True)
    if len(sequence.unique()) < len(sequence) or int(counts.max()) > longest:
        return None
    if 0 < split < len(of_row) and of_row[split - 1] == of_row[split]:
        return None
    chunks = []
    start = end = 0
    for length in counts.tolist():
        if end > start and (end - start + length > longest or end == split):
            chunks.append((start, end))
            start = end
        end += length
    return (*chunks, (start, end))
