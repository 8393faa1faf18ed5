"""The row contract in Triton, for CUDA and ROCm: which kernels are launched, and how.

Launch parameters follow from the chip and the dtype by rule; there is no autotuning. With
TRITON_INTERPRET=1 set before Triton is first imported the same kernels run on CPU tensors, slowly.
"""

import contextlib
import math

import torch
from torch import Tensor

from kepo_kernels.rows import triton_kernels as kernels
from kepo_kernels.rows.contract import NUM_COEFFICIENTS, NUM_STATS, RowSettings, shared_columns
from kepo_kernels.rows.triton_math import IMPORT_ERROR
from kepo_kernels.versions import refuse_torch_on_rocm, refuse_triton

# Columns a program reads at a time: eight per thread, one 16-byte load in bf16 and two in fp32.
BLOCK = 2048
COLUMNS_PER_THREAD = 8
STAGES = 2  # loads of a block begin while the previous block is processed
# Columns of a program: long enough that starting it costs little, short enough that a dozen rows
# fill a GPU. A row has at most MOST_SECTIONS of them; of a larger vocabulary they are longer.
SECTION = 8 * BLOCK
# A softmax holds a block in registers, 32 columns a thread: its peak is known before the first 2^x.
SOFTMAX_BLOCK = 4096
SOFTMAX_COLUMNS_PER_THREAD = 32
SEARCHED_BLOCK = 1024  # block of the section that is searched for the row's peak
MOST_SECTIONS = 128
NO_TARGET = -1

INTERPRETED = IMPORT_ERROR is None and type(kernels.softmax_kernel).__name__ != "JITFunction"


def unavailable() -> str | None:
    """Return why the Triton rows cannot be used here, or None if they can."""
    if reason := refuse_triton():
        return reason
    if IMPORT_ERROR is not None:
        return f"triton cannot be imported: {IMPORT_ERROR}"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device, and TRITON_INTERPRET=1 was not set at import"
    return refuse_torch_on_rocm()


def row_forward(
    logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
) -> Tensor:
    """Implement `row_forward` of `kepo_kernels.rows.contract`. fp64 logits are refused:
    `torch_rows` takes them."""
    _check(logits, targets, teacher)
    n, vocab = logits.shape
    table = _fp32(logits, NUM_STATS, n)
    if n == 0:
        return table
    rows = _Rows(logits, targets, teacher, settings)
    parts = _softmaxes(rows, logits, rows.vocab, rows.scale, settings.softcap)
    teacher_parts = None
    if teacher is not None:
        cap = settings.teacher_softcap
        teacher_parts = _softmaxes(rows, teacher, rows.shared, rows.teacher_scale, cap)
    section = section_length(vocab, SOFTMAX_BLOCK)
    inside = -(-rows.shared // section)
    rows.start(
        kernels.row_kernel,
        1,
        (logits, rows.targets, teacher, parts, teacher_parts, table, logits.stride(0))
        + (rows.teacher_stride, n, parts.shape[1] // 3, inside, rows.shared, *rows.numbers),
        KIND=rows.kind,
        CAPPED=rows.capped,
        SECTION=section,
        SECTIONS=MOST_SECTIONS,
        BLOCK=SEARCHED_BLOCK,
        num_warps=warps(SEARCHED_BLOCK // COLUMNS_PER_THREAD),
    )
    if teacher is None:
        return table
    sections = -(-rows.shared // rows.blocks["SECTION"])
    divergences = _fp32(logits, n, 2 * sections)
    rows.start(
        kernels.divergence_kernel,
        sections,
        (logits, teacher, table, divergences, logits.stride(0), rows.teacher_stride, n)
        + (rows.shared, *rows.numbers),
        KIND=rows.kind,
        CAPPED=rows.capped,
        **rows.blocks,
    )
    is_mixture = rows.kind == "mixture"  # its sums are in bits, and of (1 - beta) q
    unit = math.log(2) if is_mixture else 1.0
    ratio_unit = math.log(2) / (1.0 - settings.beta if is_mixture else 1.0)
    rows.start(
        kernels.finish_kernel,
        1,
        (divergences, table, n, sections, unit, ratio_unit),
        SECTIONS=MOST_SECTIONS,
        num_warps=1,
    )
    return table


def row_backward_(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor,
    settings: RowSettings,
    out: Tensor | None = None,
) -> None:
    """Implement `row_backward_` of `kepo_kernels.rows.contract`. fp64 logits are refused:
    `torch_rows` takes them."""
    _check(logits, targets, teacher)
    n, vocab = logits.shape
    out = logits if out is None else out
    for name, x, width in (
        ("table", table, NUM_STATS),
        ("coefficients", coefficients, NUM_COEFFICIENTS),
    ):
        expected = f"contiguous float32 of shape {(width, n)} on {logits.device}"
        fits = x.dtype == torch.float32 and x.shape == (width, n) and x.is_contiguous()
        _require(name, x, expected, fits and x.device == logits.device)
    expected = f"shape {(n, vocab)}, columns side by side, on {logits.device}"
    _require("out", out, expected, out.shape == logits.shape and out.device == logits.device)
    _require("out", out, expected, out.stride(1) == 1 or vocab == 1)
    if n == 0:
        return
    rows = _Rows(logits, targets, teacher, settings)
    rows.start(
        kernels.backward_kernel,
        rows.sections,
        (logits, rows.targets, teacher, table, coefficients, out, logits.stride(0))
        + (rows.teacher_stride, out.stride(0), n, vocab, rows.shared, *rows.numbers[:4])
        + (1.0 / settings.temperature, *rows.numbers[4:]),
        KIND=rows.kind,
        CAPPED=rows.capped,
        **rows.blocks,
    )


def _softmaxes(rows: "_Rows", logits: Tensor, vocab: int, scale: float, softcap: float) -> Tensor:
    """Compute the softmax parts of every section of the leading `vocab` columns."""
    blocks = _softmax_blocks(rows.vocab)
    section = blocks["SECTION"]
    sections = -(-rows.shared // section) + -(-(vocab - rows.shared) // section)
    parts = _fp32(logits, rows.count, 3 * sections)
    rows.start(
        kernels.softmax_kernel,
        sections,
        (logits, parts, logits.stride(0), vocab, rows.shared, scale, softcap),
        CAPPED=softcap > 0,
        **blocks,
    )
    return parts


def _softmax_blocks(vocab: int) -> dict[str, int]:
    section = section_length(vocab, SOFTMAX_BLOCK)
    threads = SOFTMAX_BLOCK // SOFTMAX_COLUMNS_PER_THREAD
    return {"SECTION": section, "BLOCK": SOFTMAX_BLOCK, "num_warps": warps(threads)}


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute gradient * factor in a new tensor of `dtype`, rounded once.

    torch.mul with `out` of another dtype is as exact, at half of the bandwidth.

    Args:
        gradient: fp32, contiguous.
        factor: 0-d fp32 on the same device.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    grid = (-(-out.numel() // BLOCK),)
    if grid[0]:
        arguments = (gradient, factor, out, out.numel())
        threads = warps(BLOCK // COLUMNS_PER_THREAD)
        _start(kernels.scaled_kernel, grid, out.device, *arguments, BLOCK=BLOCK, num_warps=threads)
    return out


class _Rows:
    """The arguments that all launches of one call share."""

    def __init__(
        self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
    ):
        n, self.vocab = logits.shape
        self.count, self.device = n, logits.device
        self.shared = shared_columns(logits, teacher)
        section = section_length(self.vocab, SECTION)
        inside = -(-self.shared // section)
        self.sections = inside + -(-(self.vocab - self.shared) // section)
        self.blocks = {"SECTION": section, "BLOCK": BLOCK, "STAGES": STAGES}
        self.blocks["num_warps"] = warps(BLOCK // COLUMNS_PER_THREAD)
        if targets is None:
            targets = logits.new_full((n,), NO_TARGET, dtype=torch.int64)
        self.targets = targets
        self.teacher_stride = 0 if teacher is None else teacher.stride(0)
        kinds = {0.0: "forward", 1.0: "reverse"}
        self.kind = "none" if teacher is None else kinds.get(settings.beta, "mixture")
        self.capped = settings.softcap > 0 or (teacher is not None and settings.teacher_softcap > 0)
        bits = 1.0 / math.log(2)  # per nat
        self.scale = bits / settings.temperature
        self.teacher_scale = bits / settings.teacher_temperature
        weights = (0.0, 0.0)
        if self.kind == "mixture":
            weights = (math.log2(1.0 - settings.beta), math.log2(settings.beta))
        caps = float(settings.softcap), float(settings.teacher_softcap)
        self.numbers = (*weights, self.scale, self.teacher_scale, *caps)

    def start(self, kernel, programs: int, arguments: tuple, **constants: object) -> None:
        """Launch `programs` programs for each row."""
        _start(kernel, (self.count, programs), self.device, *arguments, **constants)


def section_length(vocab: int, longest: int) -> int:
    """Return the columns per section. One section fewer than there are lanes leaves room for the
    cut at `shared`."""
    while -(-vocab // longest) >= MOST_SECTIONS:
        longest *= 2
    return longest


def warps(threads: int) -> int:
    """Return the number of warps of so many threads: on AMD's data centre GPUs a warp has 64."""
    return max(1, threads // (64 if torch.version.hip else 32))


def _start(kernel, grid: tuple[int, ...], device: torch.device, *arguments, **constants) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # enable_fp_fusion: off by default from Triton 3.10 on; an upgrade must not change the bits.
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _check(logits: Tensor, targets: Tensor | None, teacher: Tensor | None) -> None:
    """Check again everything that could make a kernel read out of bounds."""
    rows, vocab = logits.shape
    if logits.dtype == torch.float64:
        raise ValueError(
            "triton_rows: logits are float64 and the kernels compute in float32; use impl='torch'"
        )
    expected = "a GPU tensor, columns side by side"
    _require("logits", logits, expected, logits.is_cuda or INTERPRETED)
    _require("logits", logits, expected, logits.stride(1) == 1 or vocab == 1)
    if teacher is not None:
        expected = f"{logits.dtype} of {rows} rows, columns side by side, on {logits.device}"
        fits = teacher.dtype == logits.dtype and teacher.shape[0] == rows
        _require("teacher", teacher, expected, fits and teacher.device == logits.device)
        _require("teacher", teacher, expected, teacher.stride(1) == 1 or teacher.shape[1] == 1)
    if targets is not None:
        expected = f"contiguous int64 of shape {(rows,)} on {logits.device}"
        fits = targets.dtype == torch.int64 and targets.shape == (rows,)
        fits = fits and targets.is_contiguous() and targets.device == logits.device
        _require("targets", targets, expected, fits)


def _require(name: str, x: Tensor, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"triton_rows: {name} has shape {tuple(x.shape)}, stride {x.stride()}, {x.dtype} on "
            f"{x.device}; expected {expected} (kepo_kernels/rows/contract.py)"
        )
