"""The bare matrix products of our losses: the time below which no chunked call of them can come.

Same chunks, same products on the same inputs, and nothing between them. Where the processor
multiplies bf16 slowly these are fp32 products of upcast strips; plain bf16 `mm`, as peers use it
there, would make a floor many times higher.
"""

from __future__ import annotations

import torch
from losses_of_ours import NotComparable
from measure import Call
from problems import Problem
from torch import Tensor

from kepo_kernels import engine, gemm, pages


def chunk_rows(problem: Problem, rows: int, teacher_rows: int) -> int:
    """Rows per chunk of a call with so many rows, of which so many meet the teacher."""
    teacher_vocab, teacher_hidden = problem.teacher_lm_head.shape
    vocab, hidden = problem.lm_head.shape
    return engine.plan(
        rows,
        hidden,
        vocab,
        teacher_rows=teacher_rows,
        teacher_hidden_size=teacher_hidden,
        teacher_vocab=teacher_vocab,
        dtype=problem.hidden.dtype,
        device=problem.hidden.device,
    ).chunk_rows


def floor(problem: Problem, case: str) -> Call:
    p, every = problem, torch.arange(problem.rows, device=problem.hidden.device)
    opened = p.gate(case)[:, None].expand(p.targets.shape).flatten()
    if case == "two_calls":
        calls = [_products(p, none_of(every), every), _products(p, every[opened], none_of(every))]
        return lambda: [call() for call in calls]
    if case in ("kd_open", "kd_half", "kd_tol"):
        return _products(p, every[opened], none_of(every))
    if case in ("joint", "joint_half"):
        return _products(p, every[opened], every[~opened])
    if case in ("grpo", "grpo_tol", "ce"):
        return _products(p, none_of(every), every)
    if case == "logprobs":  # backward computes the logits again
        return _products(p, none_of(every), every, forwards=2)
    if case == "logprobs_forward":
        return _products(p, none_of(every), every, backward=False)
    raise NotComparable(f"no products are listed for {case}")


def none_of(rows: Tensor) -> Tensor:
    return rows[:0]


def _products(
    p: Problem, with_teacher: Tensor, without: Tensor, forwards: int = 1, backward: bool = True
) -> Call:
    device, dtype = p.hidden.device, p.hidden.dtype
    logits_dtype = gemm.default_logits_dtype(dtype, device)
    dlogits_dtype = gemm.dlogits_dtype(dtype, logits_dtype, device)
    x, y = p.hidden.detach().flatten(0, 1), p.teacher_hidden.flatten(0, 1)
    w, teacher_w = p.lm_head.detach(), p.teacher_lm_head
    size = chunk_rows(p, len(with_teacher) + len(without), len(with_teacher))
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
    return list(rows.split(-(-len(rows) // -(-len(rows) // size))))
