"""The bare matrix products of our losses: the time below which no chunked call of them can come.

Same products on the same inputs, and nothing between them, in chunks of the length at which they
are fastest, whatever the engine's own is. Where the processor multiplies bf16 slowly these are fp32
products of upcast strips; plain bf16 `mm` would make a floor many times higher there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.losses.losses_of_ours import NotComparable
from benchmarks.losses.measure import Call, Measurement, time_in_turn, watched
from benchmarks.losses.problems import Problem
from kepo_kernels.compute import gemm, pages
from kepo_kernels.compute.chunks import chunking

LARGEST = 4 << 30  # bytes of a chunk's logits, student's and teacher's: chunks beyond are not tried
Span = tuple[Tensor, Tensor]  # rows of a call that meet the teacher, and rows that do not


def chunk_rows(problem: Problem, rows: int, teacher_rows: int) -> int:
    """Rows per chunk of a call with so many rows, of which so many meet the teacher."""
    teacher_vocab, teacher_hidden = problem.teacher_lm_head.shape
    vocab, hidden = problem.lm_head.shape
    return chunking(
        rows,
        hidden,
        vocab,
        teacher_rows=teacher_rows,
        teacher_hidden_size=teacher_hidden,
        teacher_vocab=teacher_vocab,
        dtype=problem.hidden.dtype,
        device=problem.hidden.device,
    ).chunk_rows


def fastest(problem: Problem, case: str, rounds: int = 2) -> tuple[Call, Measurement]:
    """The floor in chunks of the best of some lengths, and which that is. Every length is called
    once, and then timed in so many rounds."""
    device = problem.hidden.device
    calls = {length: floor(problem, case, length) for length in lengths(problem, case)}
    measured = {length: watched(call, device) for length, call in calls.items()}
    for _ in range(rounds):
        time_in_turn(calls, measured, device)
    best = min(measured, key=lambda length: min(measured[length].times))
    note = f"chunks of {best} rows, the fastest of {', '.join(map(str, measured))}"
    return calls[best], Measurement(min(measured[best].times), measured[best].peak_mib, note=note)


def lengths(problem: Problem, case: str) -> list[int]:
    """Rows of a chunk worth trying: the engine's own, half, twice, four times, and all rows."""
    spans = _spans(problem, case)
    most = max(len(rows) for span in spans for rows in span)
    own = max(chunk_rows(problem, len(a) + len(b), len(a)) for a, b in spans)
    a_row = len(problem.lm_head) + len(problem.teacher_lm_head)
    dtype, device = problem.hidden.dtype, problem.hidden.device
    a_row *= gemm.default_logits_dtype(dtype, device).itemsize
    wanted = (max(1, own // 2), own, 2 * own, 4 * own, most)
    fitting = {min(n, most) for n in wanted if n <= own or min(n, most) * a_row <= LARGEST}
    return sorted({_equal(most, n) for n in fitting})


def floor(problem: Problem, case: str, length: int | None = None) -> Call:
    """In chunks of at most `length` rows (None = as the engine cuts them)."""
    calls = [_products(problem, *span, case, length) for span in _spans(problem, case)]
    return lambda: [call() for call in calls]


def _spans(p: Problem, case: str) -> list[Span]:
    """The rows of each call of the case."""
    every = torch.arange(p.rows, device=p.hidden.device)
    opened, none = p.gate(case)[:, None].expand(p.targets.shape).flatten(), every[:0]
    if case == "two_calls":
        return [(none, every), (every[opened], none)]
    if case in ("kd_open", "kd_half", "kd_tol"):
        return [(every[opened], none)]
    if case in ("joint", "joint_half"):
        return [(every[opened], every[~opened])]
    if case in ("grpo", "grpo_tol", "ce", "logprobs", "logprobs_forward"):
        return [(none, every)]
    raise NotComparable(f"no products are listed for {case}")


def _products(
    p: Problem, with_teacher: Tensor, without: Tensor, case: str, length: int | None
) -> Call:
    forwards = 2 if case == "logprobs" else 1  # its backward computes the logits again
    backward = case != "logprobs_forward"
    device, dtype = p.hidden.device, p.hidden.dtype
    logits_dtype = gemm.default_logits_dtype(dtype, device)
    dlogits_dtype = gemm.dlogits_dtype(dtype, logits_dtype, device)
    x, y = p.hidden.detach().flatten(0, 1), p.teacher_hidden.flatten(0, 1)
    w, teacher_w = p.lm_head.detach(), p.teacher_lm_head
    size = length or chunk_rows(p, len(with_teacher) + len(without), len(with_teacher))
    chunks = [(rows, True) for rows in _split(with_teacher, size)]
    chunks += [(rows, False) for rows in _split(without, size)]
    longest = max((len(rows) for rows, _ in chunks), default=0)

    # What meets the operands in the gradient products: on CUDA the row kernel writes 16 bits. Not
    # zeros, with which a GPU needs less power and multiplies faster.
    dlogits = None
    if backward and dlogits_dtype != logits_dtype:
        dlogits = torch.randn(longest, len(w), dtype=dlogits_dtype, device=device)

    def run() -> None:
        made = pages.empty if gemm.writes_first(device) else pages.zeros
        dw = made(w.shape, gemm.gradient_dtype(dtype), device) if backward else None
        student = pages.empty((longest, len(w)), logits_dtype, device)
        gradient = student if dlogits is None else dlogits
        teacher = None
        if len(with_teacher):
            teacher = pages.empty((longest, len(teacher_w)), logits_dtype, device)
        for sweep in range(forwards):
            for index, (rows, has_teacher) in enumerate(chunks):
                chunk, logits = x[rows], student[: len(rows)]
                gemm.project_(logits, chunk, w, None)
                if has_teacher:
                    gemm.project_(teacher[: len(rows)], y[rows], teacher_w, None)
                if backward and sweep == forwards - 1:
                    gemm.hidden_gradient(gradient[: len(rows)], w)
                    gemm.accumulate_head_(dw, gradient[: len(rows)], chunk, first=index == 0)

    return run


def _split(rows: Tensor, size: int) -> list[Tensor]:
    """Chunks of equal length, as the engine cuts them."""
    if len(rows) == 0:
        return []
    return list(rows.split(_equal(len(rows), size)))


def _equal(rows: int, size: int) -> int:
    """The length of the fewest equal chunks of at most `size` rows."""
    return -(-rows // -(-rows // size))
