"""From a caller's arguments to the engine's `LinearProblem`.

Which rows take part, and how many of them fit a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kepo_kernels import gemm
from kepo_kernels.dispatch import pick_rows
from kepo_kernels.engine import LinearProblem, RowPlan
from kepo_kernels.errors import KepoInputError
from kepo_kernels.validate import Validator, describe
from kepo_kernels.weights import per_token

# Logits of one chunk, student and teacher together. On a GPU fp32 gradients of a large head cost a
# pass over the head per chunk, so chunks want to be about 2048 rows; on a CPU they want to be small
# enough not to page in gigabytes.
DEFAULT_WORKSPACE = {"cpu": 128 << 20, "cuda": 2560 << 20}


@dataclass(frozen=True)
class Teacher:
    """The frozen side of a call.

    `hidden` has the student's sequences, or only those whose gate is not 0.
    """

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None
    gate: Tensor | None  # (B,)

    def check(self, check: Validator, student: Tensor) -> None:
        names = ("teacher_hidden", "teacher_lm_head", "teacher_bias")
        check.head(names, self.hidden, self.lm_head, self.bias)
        check.same_device(
            student,
            teacher_hidden=self.hidden,
            teacher_lm_head=self.lm_head,
            teacher_bias=self.bias,
        )
        check.require(
            self.hidden.dtype == student.dtype,
            f"hidden is {describe(student)} and teacher_hidden {describe(self.hidden)}: dtypes "
            "differ; cast one of them",
        )
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
    lm_head: Tensor,
    targets: Tensor | None,
    teacher: Teacher | None,
    active: Tensor,
    distilled: Tensor | None,
    settings: dict[str, object],
    *,
    beta: float = 0.5,
    temperature: float,
) -> LinearProblem:
    """Plan the rows and fix every setting of the chunk loop.

    `active` and `distilled` are bool of shape lead: tokens that take part, and those among them
    that meet the teacher (None: none do).
    """
    lead = hidden.shape[:-1]
    active = active.reshape(-1)
    shared = 0
    if teacher is None or distilled is None:
        plain, teacher_rows = active.nonzero().squeeze(-1), hidden.new_empty(0, dtype=torch.int64)
        plan = RowPlan(plain, teacher_rows)
    else:
        distilled = distilled.reshape(-1) & active
        with_teacher = distilled.nonzero().squeeze(-1)
        without = (active & ~distilled).nonzero().squeeze(-1)
        plan = RowPlan(torch.cat((with_teacher, without)), teacher.rows(with_teacher, lead))
        # Where every gate is closed the chunks are those of a call without a teacher, to the row.
        shared = min(len(lm_head), len(teacher.lm_head)) if len(with_teacher) else 0
    if targets is not None:
        # What stands on inactive tokens is never read; int64 is what the kernels take.
        targets = targets.reshape(-1).to(torch.int64)

    dtype = settings.get("logits_dtype")
    check.logits_dtype(dtype, hidden)
    dtype = dtype or gemm.default_logits_dtype(hidden.dtype, hidden.device)
    workspace = settings.get("workspace_bytes") or DEFAULT_WORKSPACE.get(
        hidden.device.type, DEFAULT_WORKSPACE["cuda"]
    )
    try:
        row_kernels = pick_rows(settings.get("impl", "auto"), hidden.device, dtype)
    except KepoInputError as error:
        check.refuse(str(error))
    return LinearProblem(
        function=check.function,
        plan=plan,
        targets=targets,
        teacher_hidden=None if teacher is None else teacher.hidden.detach().flatten(0, -2),
        teacher_lm_head=None if teacher is None else teacher.lm_head.detach()[:shared],
        teacher_bias=None
        if teacher is None or teacher.bias is None
        else teacher.bias.detach()[:shared],
        beta=float(beta),
        temperature=float(temperature),
        logits_dtype=dtype,
        row_kernels=row_kernels,
        chunk_rows=_chunk_rows(
            check, workspace, settings.get("chunk_rows"), (len(lm_head) + shared) * dtype.itemsize
        ),
    )


def _chunk_rows(
    check: Validator, workspace_bytes: int, chunk_rows: int | None, row_bytes: int
) -> int:
    """Rows per chunk: as asked, or as many as the workspace holds."""
    if chunk_rows is not None:
        return chunk_rows
    check.require(
        workspace_bytes >= row_bytes,
        f"workspace_bytes={workspace_bytes}: one row of logits takes {row_bytes} bytes here; pass "
        "at least that, or None for the default",
    )
    return workspace_bytes // row_bytes


def active_tokens(lead: torch.Size, *weights: Tensor) -> Tensor:
    """Tokens on which any of the weights is not 0."""
    active = torch.zeros(lead, dtype=torch.bool, device=weights[0].device)
    for weight in weights:
        active |= per_token(weight, lead) != 0
    return active
