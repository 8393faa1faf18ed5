"""The memory of the fused loss for one micro-batch, by `kepo_kernels.compute.chunks`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kepo.errors import KepoConfigError
from kepo.planner.model_sizes import ModelSizes
from kepo.sections import ObjectiveConfig
from kepo_kernels.compute import gemm
from kepo_kernels.compute.chunks import Sizes, chunk_length
from kepo_kernels.compute.pages import KEPT_BYTES, LEAST_BYTES
from kepo_kernels.errors import KepoInputError
from kepo_kernels.rows import torch_rows
from kepo_kernels.rows.dispatch import pick_rows


@dataclass(frozen=True)
class LossMemory:
    """Bytes that the loss holds above the flattened hidden states and heads that it reads."""

    forward: int
    """Bytes in forward: gradient accumulators, and the workspace of a chunk."""
    backward: int
    """Bytes in backward: gradient accumulators, and the gradients that are made of them."""
    head_gradient: int
    """Bytes of the head's gradient, which backward returns; 0 if the head is frozen."""
    pages: int
    """Bytes that are kept for the next call on a CPU; 0 on a GPU."""


def loss_memory(
    config: ObjectiveConfig,
    device: str,
    tokens: int,
    several: bool,
    student: ModelSizes,
    teacher: ModelSizes | None,
) -> LossMemory:
    """Return the loss's memory for a micro-batch of ``tokens`` completion tokens.

    If there is a teacher, every token is distilled. several: the step has more than one
    micro-batch. Raises KepoConfigError if workspace_bytes is too small, as the loss would.
    """
    dtype, on_cpu = student.dtype, device == "cpu"
    sizes = _sizes(config, device, tokens, student, teacher)
    rows, workspace = _chunk(sizes, config)
    wide = gemm.gradient_dtype(dtype).itemsize
    of_hidden = tokens * student.hidden
    of_head = student.vocab * student.hidden if student.trains_head else 0
    accumulators = (of_hidden + of_head) * wide
    returned = (of_hidden + of_head) * dtype.itemsize
    logits = rows * (student.vocab + sizes.shared_vocab) * sizes.logits_dtype.itemsize
    gradients = [of_hidden * wide, of_hidden * dtype.itemsize, of_head * wide]
    if several:  # with one micro-batch the parameter takes it over
        gradients.append(of_head * dtype.itemsize)
    return LossMemory(
        forward=accumulators + workspace,
        backward=accumulators + returned,
        head_gradient=of_head * dtype.itemsize,
        pages=_kept_pages(gradients, logits) if on_cpu else 0,
    )


def scoring_workspace(config: ObjectiveConfig, device: str, tokens: int, model: ModelSizes) -> int:
    """Return the bytes of a chunk in which a frozen model's log-probabilities of ``tokens`` tokens
    are computed. Raises KepoConfigError as `loss_memory` does."""
    return _chunk(_sizes(config, device, tokens, model, None), config)[1]


def _sizes(
    config: ObjectiveConfig,
    device: str,
    tokens: int,
    student: ModelSizes,
    teacher: ModelSizes | None,
) -> Sizes:
    place = torch.device(device)
    logits_dtype = gemm.default_logits_dtype(student.dtype, place)
    if config.logits_dtype is not None:
        logits_dtype = getattr(torch, config.logits_dtype)
    return Sizes(
        rows=tokens,
        hidden_size=student.hidden,
        vocab=student.vocab,
        dtype=student.dtype,
        logits_dtype=logits_dtype,
        device=place,
        teacher_rows=0 if teacher is None else tokens,
        teacher_hidden_size=0 if teacher is None else teacher.hidden,
        shared_vocab=0 if teacher is None else min(student.vocab, teacher.vocab),
        tokens=tokens,
        torch_impl=device == "cpu" and pick_rows(config.impl, place, logits_dtype) is torch_rows,
        compacts=config.grad_tol > 0,
    )


def _chunk(sizes: Sizes, config: ObjectiveConfig) -> tuple[int, int]:
    """Return the rows of a chunk, and the bytes that it takes."""
    tokens = sizes.rows
    try:
        rows = min(chunk_length(sizes, config.workspace_bytes, None), tokens)
    except KepoInputError as error:
        raise KepoConfigError(f"workspace_bytes: for a loss of {tokens} tokens, {error}") from error
    rows = -(-tokens // -(-tokens // rows))  # chunks are of equal length
    return rows, sizes.bytes_of(rows, sizes.strip_bytes(config.workspace_bytes))


def _kept_pages(gradients: list[int], logits: int) -> int:
    """Return the bytes that `kepo_kernels.compute.pages` keeps between calls.

    It keeps the gradients' memory, and gives back the logits' to make room for it. If all gradients
    are too small to be kept, it keeps the logits' memory.
    """
    kept = 0
    for size in [size for size in gradients if size >= LEAST_BYTES] or [logits]:
        if size >= LEAST_BYTES and kept + size <= KEPT_BYTES:
            kept += size
    return kept
