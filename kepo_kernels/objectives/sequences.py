"""Losses whose tokens depend on their sequence (GSPO): chunks hold it, or a pass comes first.

A sequence-level ratio needs the log-probabilities of the sequence's other tokens. If no chunk cuts
a sequence, they are available when the chunk's loss is formed, and the GEMMs stay those of any
other loss. If a sequence is longer than a chunk, its log-probabilities come from a separate pass.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kepo_kernels.compute.autograd import TokenLoss, TokenStats
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.problem import even_chunks, whole_sequence_chunks
from kepo_kernels.compute.sweep import ActiveRows, LinearProblem, Student, sweep


def with_whole_sequences(
    student: Student,
    problem: LinearProblem,
    lead: torch.Size,
    active: Tensor,
    token_loss: TokenLoss,
) -> tuple[LinearProblem, TokenLoss]:
    """Return the problem and a loss correct in its chunks; `active` (B, T) are the loss's
    tokens."""
    chunks = whole_sequence_chunks(problem.active_rows, lead[1], problem.chunk_rows)
    if chunks is not None:
        return replace(problem, active_rows=replace(problem.active_rows, chunks=chunks)), token_loss
    found = active.reshape(-1).nonzero().squeeze(-1)
    rows = moved(found, student.hidden.device)
    alone = replace(
        problem,
        active_rows=ActiveRows(
            rows, rows[:0], even_chunks(0, len(rows), problem.chunk_rows), found
        ),
        teacher_hidden=None,
        teacher_lm_head=None,
        top_k=None,
    )
    with torch.no_grad():
        numbers = sweep(student, alone, None, None).numbers
    return problem, linearised(token_loss, numbers, rows)


def linearised(token_loss: TokenLoss, numbers: Tensor, rows: Tensor) -> TokenLoss:
    """Return a loss of the same value and gradient at these numbers (3, N), with tokens
    independent."""
    with torch.enable_grad():
        leaves = numbers[:, rows].requires_grad_()
        values = token_loss(TokenStats(*leaves.unbind(0)), rows)
        (slope,) = torch.autograd.grad(values.sum(), leaves)
    value = numbers.new_zeros(numbers.shape[1]).index_put((rows,), values.detach().to(numbers))
    slopes = torch.zeros_like(numbers)
    slopes[:, rows] = slope

    def linear(stats: TokenStats, rows: Tensor) -> Tensor:
        c, _, e = slopes[:, rows]
        logprobs, _, entropy = numbers[:, rows]
        return value[rows] + c * (stats.logprobs - logprobs) + e * (stats.entropy - entropy)

    return linear
