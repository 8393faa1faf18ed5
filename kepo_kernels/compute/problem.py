"""From a caller's arguments to the chunk loop's `LinearProblem`.

Which rows take part, and in which chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kepo_kernels.compute import gemm
from kepo_kernels.compute.chunks import Sizes, chunk_length, gpu_at_hand
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.sweep import LinearProblem, RowPlan, Student
from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import Head, LoRA
from kepo_kernels.rows import torch_rows
from kepo_kernels.rows.contract import RowSettings
from kepo_kernels.rows.dispatch import pick_rows
from kepo_kernels.validate import Validator, describe


@dataclass(frozen=True, eq=False)
class Teacher:
    """The frozen side of a call.

    `hidden` has the student's sequences, or only those whose gate is not 0.
    """

    hidden: Tensor
    head: Head
    bias: Tensor | None
    gate: Tensor | None  # (B,)
    temperature: float

    def check(self, check: Validator, student: Tensor) -> None:
        names = ("teacher_hidden", "teacher_lm_head", "teacher_bias")
        check.head(names, self.hidden, self.head, self.bias)
        check.same_device(
            student,
            teacher_hidden=self.hidden,
            teacher_lm_head=self.head.weight,
            teacher_bias=self.bias,
        )
        check.dtypes(("hidden", student), ("teacher_hidden", self.hidden))
        check.gate(self.gate, student.shape[:-1])
        lead = student.shape[:-1]
        if self.hidden.shape[:-1] == lead:
            return
        opened = "all" if self.gate is None else f"the {int(self.gate.count_nonzero())} open"
        check.require(
            self._is_compact(lead),
            f"teacher_hidden {describe(self.hidden)} fits neither all {lead[0]} sequences of "
            f"hidden {describe(student)} nor {opened} ones; its leading dimensions must be "
            f"{list(lead)}, or the number of sequences whose gate is not 0 in place of the first",
        )

    def _is_compact(self, lead: torch.Size) -> bool:
        if self.gate is None or self.hidden.dim() != len(lead) + 1:
            return False
        opened = int(self.gate.count_nonzero())
        return self.hidden.shape[:-1] == (opened, *lead[1:])

    def rows(self, rows: Tensor, lead: torch.Size) -> Tensor:
        """Where rows of the flattened student stand in the flattened teacher."""
        if self.hidden.shape[:-1] == lead:
            return rows
        tokens = lead[1] if len(lead) == 2 else 1
        # Of a sequence among the open ones.
        position = self.gate.ne(0).cumsum(0).to(rows.device) - 1
        return position[rows // tokens] * tokens + rows % tokens


def build_problem(
    check: Validator,
    hidden: Tensor,
    head: Head,
    bias: Tensor | None,
    targets: Tensor | None,
    teacher: Teacher | None,
    active: Tensor,
    distilled: Tensor | None,
    engine: dict[str, object],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Student, LinearProblem]:
    """Plan the rows and fix every setting of the chunk loop.

    `active` and `distilled` are bool of shape lead: tokens that take part, and those among them
    that meet the teacher (None: none do). With both on the CPU the host does not wait for a GPU.
    """
    lead = hidden.shape[:-1]
    active = active.reshape(-1)
    shared = 0
    if teacher is None or distilled is None:
        rows = active.nonzero().squeeze(-1)
        teacher_rows = rows[:0]
    else:
        distilled = distilled.reshape(-1) & active
        with_teacher = distilled.nonzero().squeeze(-1)
        rows = torch.cat((with_teacher, (active & ~distilled).nonzero().squeeze(-1)))
        teacher_rows = teacher.rows(with_teacher, lead)
        # Where every gate is closed the chunks are those of a call without a teacher, to the row.
        shared = min(len(head.weight), len(teacher.head.weight)) if len(with_teacher) else 0
    if targets is not None:
        # What stands on inactive tokens is never read; int64 is what the kernels take.
        targets = targets.reshape(-1).to(torch.int64)

    operands = [hidden, *_tensors(head, bias)]
    if teacher is not None:
        operands += [teacher.hidden, *_tensors(teacher.head, teacher.bias)]
    dtypes = {x.dtype for x in operands}
    operand_dtype = gemm.operand_dtype(dtypes)
    dtype = engine.get("logits_dtype")
    check.logits_dtype(dtype, operand_dtype)
    dtype = dtype or gemm.default_logits_dtype(operand_dtype, hidden.device)
    grad_tol = float(engine.get("grad_tol", 0.0))
    check.require(
        grad_tol == 0.0 or hidden.device.type == "cpu",
        f"grad_tol={grad_tol} with tensors on {hidden.device}: columns are left out on a CPU only, "
        "where that saves time; leave grad_tol out, or pass 0",
    )
    workspace_bytes = engine.get("workspace_bytes")
    try:
        row_kernels = pick_rows(engine.get("impl", "auto"), hidden.device, dtype)
        sizes = Sizes(
            rows=len(rows),
            hidden_size=hidden.shape[-1],
            vocab=len(head.weight),
            dtype=min(dtypes, key=lambda x: x.itemsize),
            mixed=len(dtypes) > 1,
            logits_dtype=dtype,
            device=hidden.device,
            teacher_rows=len(teacher_rows),
            teacher_hidden_size=teacher.hidden.shape[-1] if shared else 0,
            shared_vocab=shared,
            tokens=active.numel(),
            lora_rank=0 if head.lora is None else len(head.lora.a),
            torch_impl=row_kernels is torch_rows,
            compacts=grad_tol > 0.0,
            **gpu_at_hand(hidden.device),
        )
        chunk_rows = chunk_length(sizes, workspace_bytes, engine.get("chunk_rows"))
        strip_bytes = sizes.strip_bytes(workspace_bytes)
    except KepoInputError as error:
        check.refuse(str(error))
    # Numbers may be numpy's or 0-d tensors; the kernels want Python's.
    own_scale = float(head.logit_scale)
    scale = 1.0 if teacher is None else float(teacher.head.logit_scale)
    chunks = even_chunks(len(teacher_rows), len(rows), chunk_rows)
    there = (moved(x, hidden.device) for x in (rows, teacher_rows))
    return student_of(hidden, head, bias), LinearProblem(
        function=check.function,
        plan=RowPlan(*there, chunks, rows),
        targets=targets,
        teacher_hidden=None if teacher is None else _flat(teacher.hidden.detach()),
        teacher_lm_head=None if teacher is None else teacher.head.weight.detach()[:shared],
        teacher_bias=None
        if teacher is None or teacher.bias is None
        else teacher.bias.detach()[:shared],
        teacher_lora=None if teacher is None else _shared(teacher.head.lora, shared),
        # A scale s is a temperature 1/s: softmax(s z / T), and s z capped at c is s (z capped at
        # c / s).
        settings=RowSettings(
            beta=float(beta),
            temperature=float(temperature) / own_scale,
            teacher_temperature=1.0 if teacher is None else teacher.temperature / scale,
            softcap=float(head.softcap or 0.0) / own_scale,
            teacher_softcap=0.0 if teacher is None else float(teacher.head.softcap or 0.0) / scale,
        ),
        lora_scale=1.0 if head.lora is None else float(head.lora.scale),
        operand_dtype=operand_dtype,
        logits_dtype=dtype,
        row_kernels=row_kernels,
        chunk_rows=chunk_rows,
        strip_rows=sizes.strip_rows(sizes.hidden_size, strip_bytes),
        teacher_strip_rows=sizes.strip_rows(sizes.teacher_hidden_size, strip_bytes),
        grad_tol=grad_tol,
    )


def _tensors(head: Head, bias: Tensor | None) -> list[Tensor]:
    given = (head.weight, bias, *(() if head.lora is None else head.lora[:2]))
    return [x for x in given if x is not None]


def student_of(hidden: Tensor, head: Head, bias: Tensor | None) -> Student:
    a, b = (None, None) if head.lora is None else head.lora[:2]
    return Student(_flat(hidden), head.weight, bias, a, b)


def _flat(states: Tensor) -> Tensor:
    """(..., H) as (N, H), or as it is where that would be a copy (a slice of longer sequences)."""
    if states.dim() == 3 and states.stride(0) != states.shape[1] * states.stride(1):
        return states
    return states.flatten(0, -2)


def _shared(lora: LoRA | None, shared: int) -> LoRA | None:
    return (
        None if lora is None else LoRA(lora.a.detach(), lora.b.detach()[:shared], float(lora.scale))
    )


def even_chunks(split: int, rows: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Chunks [start, end) of equal length, on either side of the split. They depend on the active
    rows alone, so closing a sequence gives bit for bit what leaving it out gives."""
    chunks = []
    for begin, stop in ((0, split), (split, rows)):
        count = -(-(stop - begin) // longest)
        size = -(-(stop - begin) // max(1, count))
        chunks += [(start, min(start + size, stop)) for start in range(begin, stop, max(1, size))]
    return tuple(chunks)


def whole_sequence_chunks(
    plan: RowPlan, tokens: int, longest: int
) -> tuple[tuple[int, int], ...] | None:
    """Chunks that never cut a sequence of `tokens` tokens; None if one does not fit in any.

    Nor may one have rows on both sides of the teacher's split: they meet in no chunk.
    """
    if len(plan.rows) == 0:
        return ()
    of_row, split = plan.planned_rows // tokens, len(plan.teacher_rows)
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
