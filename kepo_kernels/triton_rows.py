"""The row contract in Triton, for CUDA and ROCm: two kernels, one program per row.

Each lane of a program keeps running sums over its own columns, and the lanes are added up once, at
the end: the order of every sum depends on the vocabulary alone, so a row's bits depend neither on
its neighbours nor on their number. Offsets of rows are 64-bit (row 14,134 of a 151,936-token
vocabulary reaches past 2^31 elements). There are no atomics and there is no autotuning. With
TRITON_INTERPRET=1 set before Triton is first imported the same code runs on CPU tensors, slowly.
"""

import contextlib

import torch
from torch import Tensor

from kepo_kernels.rows import NUM_COEFFICIENTS, NUM_STATS, RowSettings, shared_columns
from kepo_kernels.triton_math import (
    IMPORT_ERROR,
    cap_slope,
    capped,
    mixture,
    policy_grad,
    read,
    reduce,
    scan,
    tl,
    triton,
    weighted,
)

# An iteration reads BLOCK columns, eight a thread: one 16-byte load in bf16, two in fp32, at no
# more than 64 registers on an A100 or H100, so that four programs share a multiprocessor.
MAX_BLOCK = 2048
COLUMNS_PER_WARP = 256


# KIND is "none" (no teacher), "forward" (beta = 0), "reverse" (beta = 1) or "mixture" (between).


@triton.jit
def _forward_kernel(
    logits,
    targets,
    teacher,
    table,
    logits_stride,
    teacher_stride,
    rows,
    vocab,
    shared,
    beta,
    inverse_temperature,
    inverse_teacher_temperature,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    none = tl.full((BLOCK,), -float("inf"), tl.float32)
    zeros = tl.zeros((BLOCK,), tl.float32)

    top, sums, moments = scan(
        logits, 0, shared, none, zeros, zeros, inverse_temperature, softcap, CAPPED, BLOCK
    )
    shared_peak, shared_total, _ = reduce(top, sums, moments, inverse_temperature)
    top, sums, moments = scan(
        logits, shared, vocab, top, sums, moments, inverse_temperature, softcap, CAPPED, BLOCK
    )
    peak, total, moment = reduce(top, sums, moments, inverse_temperature)
    log_sum = tl.log(total)
    shared_log_sum = tl.log(shared_total)

    logprob = 0.0
    if HAS_TARGETS:
        target = tl.load(logits + tl.load(targets + row)).to(tl.float32)
        if CAPPED:
            target = capped(target, softcap)
        logprob = (target - peak) * inverse_temperature - log_sum

    divergence = 0.0
    student_kl = 0.0
    teacher_peak = 0.0
    teacher_log_sum = 0.0
    if KIND != "none":
        teacher += row * teacher_stride
        inverse = inverse_teacher_temperature
        top, sums, moments = scan(
            teacher, 0, shared, none, zeros, zeros, inverse, teacher_softcap, TEACHER_CAPPED, BLOCK
        )
        teacher_peak, teacher_total, _ = reduce(top, sums, moments, inverse)
        teacher_log_sum = tl.log(teacher_total)

        # Each KL is summed as a log(a/b) - a + b: every term is >= 0, and rounding of the log-sums
        # cancels to first order.
        student_lanes, teacher_lanes = zeros, zeros
        for start in range(0, shared, BLOCK):
            z = read(logits, start + lanes, shared, softcap, CAPPED)
            y = read(teacher, start + lanes, shared, teacher_softcap, TEACHER_CAPPED)
            log_q = (z - shared_peak) * inverse_temperature - shared_log_sum
            log_p = (y - teacher_peak) * inverse - teacher_log_sum
            if KIND == "mixture":
                q, p, log_q_m, log_p_m = mixture(log_q, log_p, beta)
                # m - q and m - p, written so that nothing cancels when p is close to q.
                student_lanes += weighted(q, log_q_m) + beta * (p - q)
                teacher_lanes += weighted(p, log_p_m) + (1.0 - beta) * (q - p)
            else:
                q, p = tl.exp(log_q), tl.exp(log_p)
                if KIND == "forward":
                    teacher_lanes += weighted(p, log_p - log_q) - p + q
                else:
                    student_lanes += weighted(q, log_q - log_p) - q + p
        student_kl = tl.sum(student_lanes, 0)
        divergence = tl.sum(teacher_lanes, 0)  # for "forward"
        if KIND == "reverse":
            divergence = student_kl
        if KIND == "mixture":
            divergence = (1.0 - beta) * student_kl + beta * divergence

    # In the order of RowStats. `rows` is widened because the table is nine times as long.
    rows = tl.cast(rows, tl.int64)
    table += row
    tl.store(table, logprob)
    tl.store(table + rows, divergence)
    tl.store(table + 2 * rows, log_sum - moment / total)
    tl.store(table + 3 * rows, peak)
    tl.store(table + 4 * rows, log_sum)
    tl.store(table + 5 * rows, (shared_peak - peak) * inverse_temperature + shared_log_sum)
    tl.store(table + 6 * rows, teacher_peak)
    tl.store(table + 7 * rows, teacher_log_sum)
    tl.store(table + 8 * rows, student_kl)


@triton.jit
def _backward_kernel(
    logits,
    targets,
    teacher,
    table,
    coefficients,
    logits_stride,
    teacher_stride,
    rows,
    vocab,
    shared,
    beta,
    inverse_temperature,
    inverse_teacher_temperature,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    logits += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    table += row
    entropy = tl.load(table + 2 * rows)
    peak = tl.load(table + 3 * rows)
    log_sum = tl.load(table + 4 * rows)
    coefficients += row
    e = tl.load(coefficients + 2 * rows)
    c = 0.0  # without targets logprob is a constant
    target = tl.full((), -1, tl.int64)
    if HAS_TARGETS:
        c = tl.load(coefficients)
        target = tl.load(targets + row)

    begin = 0
    if KIND != "none":
        begin = shared
        teacher += row * teacher_stride
        g = tl.load(coefficients + rows)
        shared_log_sum = tl.load(table + 5 * rows)
        teacher_peak = tl.load(table + 6 * rows)
        teacher_log_sum = tl.load(table + 7 * rows)
        student_kl = tl.load(table + 8 * rows)
        for start in range(0, shared, BLOCK):
            column = start + lanes
            raw = read(logits, column, shared, softcap, False)
            z = capped(raw, softcap) if CAPPED else raw
            y = read(teacher, column, shared, teacher_softcap, TEACHER_CAPPED)
            x = (z - peak) * inverse_temperature
            log_q = x - shared_log_sum
            log_p = (y - teacher_peak) * inverse_teacher_temperature - teacher_log_sum
            if KIND == "mixture":
                q, _, log_q_m, _ = mixture(log_q, log_p, beta)
                grad = g * (1.0 - beta) * weighted(q, log_q_m - student_kl)
            elif KIND == "reverse":
                grad = g * weighted(tl.exp(log_q), log_q - log_p - student_kl)
            else:
                grad = g * (tl.exp(log_q) - tl.exp(log_p))
            grad += policy_grad(x - log_sum, column == target, c, e, entropy)
            grad *= inverse_temperature
            if CAPPED:
                grad *= cap_slope(raw, softcap)
            grad = grad.to(logits.dtype.element_ty)
            tl.store(logits + column, grad, mask=column < shared)
    for start in range(begin, vocab, BLOCK):
        column = start + lanes
        raw = read(logits, column, vocab, softcap, False)
        z = capped(raw, softcap) if CAPPED else raw
        log_q = (z - peak) * inverse_temperature - log_sum
        grad = policy_grad(log_q, column == target, c, e, entropy)
        grad *= inverse_temperature
        if CAPPED:
            grad *= cap_slope(raw, softcap)
        grad = grad.to(logits.dtype.element_ty)
        tl.store(logits + column, grad, mask=column < vocab)


INTERPRETED = IMPORT_ERROR is None and not isinstance(_forward_kernel, triton.JITFunction)


def unavailable() -> str | None:
    """Why the Triton rows cannot be used here, or None when they can."""
    if IMPORT_ERROR is not None:
        return f"triton cannot be imported: {IMPORT_ERROR}"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device, and TRITON_INTERPRET=1 was not set at import"
    return None


def row_forward(
    logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
) -> Tensor:
    """See `kepo_kernels.rows`. fp64 logits are refused: `torch_rows` takes them."""
    table = torch.empty(NUM_STATS, logits.shape[0], dtype=torch.float32, device=logits.device)
    _launch(_forward_kernel, logits, targets, teacher, (table,), settings)
    return table


def row_backward_(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor,
    settings: RowSettings,
) -> None:
    """See `kepo_kernels.rows`. fp64 logits are refused: `torch_rows` takes them."""
    _launch(_backward_kernel, logits, targets, teacher, (table, coefficients), settings)


def _launch(kernel, logits, targets, teacher, columns, settings: RowSettings) -> None:
    """Starts one program per row; what could make it read out of bounds is checked once more."""
    rows, vocab = logits.shape
    if logits.dtype == torch.float64:
        raise ValueError(
            "triton_rows: logits are float64 and the kernels compute in float32; use impl='torch'"
        )
    _require("logits", logits, logits.is_cuda or INTERPRETED)
    _require("logits", logits, logits.stride(1) == 1 or vocab == 1)
    if teacher is not None:
        _require("teacher", teacher, teacher.dtype == logits.dtype and teacher.shape[0] == rows)
        _require("teacher", teacher, teacher.stride(1) == 1 or teacher.shape[1] == 1)
        _require("teacher", teacher, teacher.device == logits.device)
    if targets is not None:
        _require("targets", targets, targets.dtype == torch.int64 and targets.shape == (rows,))
        _require("targets", targets, targets.is_contiguous() and targets.device == logits.device)
    widths = {"table": NUM_STATS, "coefficients": NUM_COEFFICIENTS}
    for (name, width), x in zip(widths.items(), columns, strict=False):  # forward: the table alone
        _require(name, x, x.dtype == torch.float32 and x.shape == (width, rows))
        _require(name, x, x.is_contiguous() and x.device == logits.device)
    if rows == 0:
        return

    kinds = {0: "forward", 1: "reverse"}
    block = min(max(triton.next_power_of_2(vocab), COLUMNS_PER_WARP), MAX_BLOCK)
    _start(
        kernel,
        (rows,),
        logits.device,
        logits,
        targets,
        teacher,
        *columns,
        logits.stride(0),
        0 if teacher is None else teacher.stride(0),
        rows,
        vocab,
        shared_columns(logits, teacher),
        float(settings.beta),
        1.0 / settings.temperature,
        1.0 / settings.teacher_temperature,
        float(settings.softcap),
        float(settings.teacher_softcap),
        KIND="none" if teacher is None else kinds.get(settings.beta, "mixture"),
        HAS_TARGETS=targets is not None,
        CAPPED=settings.softcap > 0,
        TEACHER_CAPPED=settings.teacher_softcap > 0,
        BLOCK=block,
        num_warps=block // COLUMNS_PER_WARP,
        # Triton 3.10 turns this off by default; said here, an upgrade does not change the bits.
        enable_fp_fusion=True,
    )


def _start(kernel, grid, device: torch.device, *args, **options) -> None:
    """The one place that launches; benchmarks/compile_kernels.py listens here."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


def _require(name: str, x: Tensor, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"triton_rows: {name} of shape {tuple(x.shape)}, stride {x.stride()}, {x.dtype} on "
            f"{x.device} does not fit the row contract (kepo_kernels/rows.py)"
        )
