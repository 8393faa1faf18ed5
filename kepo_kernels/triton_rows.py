"""The row contract in Triton, for CUDA and ROCm: what is launched, and with what.

Launch parameters follow from the chip and the dtype by rule; there is no autotuning. With
TRITON_INTERPRET=1 set before Triton is first imported the same kernels run on CPU tensors, slowly.
"""

import contextlib

import torch
from torch import Tensor

from kepo_kernels import triton_kernels as kernels
from kepo_kernels.rows import NUM_COEFFICIENTS, NUM_STATS, RowSettings, shared_columns
from kepo_kernels.triton_math import IMPORT_ERROR

# Columns that a program reads at a time: eight a thread, one 16-byte load in bf16 and two in fp32.
# On an H100 that takes 127 registers at most, none of them spilled, so that two to three programs
# share a multiprocessor (benchmarks/compile_kernels.py).
BLOCK = 2048
COLUMNS_PER_THREAD = 8
# Columns of a program: long enough that starting it costs little, short enough that a dozen rows
# fill a GPU. A row has at most MOST_SECTIONS of them; of a larger vocabulary they are longer.
SECTION = 8 * BLOCK
MOST_SECTIONS = 128
NO_TARGET = -1

INTERPRETED = IMPORT_ERROR is None and type(kernels.softmax_kernel).__name__ != "JITFunction"


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
    _check(logits, targets, teacher)
    n, vocab = logits.shape
    table = _fp32(logits, NUM_STATS, n)
    if n == 0:
        return table
    rows = _Rows(logits, targets, teacher, settings)
    parts = _fp32(logits, n, 3 * rows.sections)
    rows.start(
        kernels.softmax_kernel,
        rows.sections,
        (logits, parts, logits.stride(0), vocab, rows.shared, rows.inverse, settings.softcap),
        CAPPED=settings.softcap > 0,
        **rows.blocks,
    )
    teacher_parts = divergences = None
    if teacher is not None:
        teacher_parts = _fp32(logits, n, 3 * rows.inside)
        rows.start(
            kernels.softmax_kernel,
            rows.inside,
            (teacher, teacher_parts, teacher.stride(0), rows.shared, rows.shared)
            + (rows.teacher_inverse, settings.teacher_softcap),
            CAPPED=settings.teacher_softcap > 0,
            **rows.blocks,
        )
        divergences = _fp32(logits, n, 2 * rows.inside)
        rows.start(
            kernels.divergence_kernel,
            rows.inside,
            (logits, teacher, parts, teacher_parts, divergences, logits.stride(0))
            + (teacher.stride(0), rows.sections, rows.shared, *rows.numbers),
            KIND=rows.kind,
            CAPPED=rows.capped,
            SECTIONS=MOST_SECTIONS,
            **rows.blocks,
        )
    rows.start(
        kernels.finish_kernel,
        1,
        (logits, rows.targets, parts, teacher_parts, divergences, table, logits.stride(0), n)
        + (rows.sections, rows.inside, *rows.numbers[:4]),
        KIND=rows.kind,
        CAPPED=settings.softcap > 0,
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
    """See `kepo_kernels.rows`. fp64 logits are refused: `torch_rows` takes them."""
    _check(logits, targets, teacher)
    n, vocab = logits.shape
    out = logits if out is None else out
    for name, x, width in (
        ("table", table, NUM_STATS),
        ("coefficients", coefficients, NUM_COEFFICIENTS),
    ):
        _require(name, x, x.dtype == torch.float32 and x.shape == (width, n))
        _require(name, x, x.is_contiguous() and x.device == logits.device)
    _require("out", out, out.shape == logits.shape and out.device == logits.device)
    _require("out", out, out.stride(1) == 1 or vocab == 1)
    if n == 0:
        return
    rows = _Rows(logits, targets, teacher, settings)
    rows.start(
        kernels.backward_kernel,
        rows.sections,
        (logits, rows.targets, teacher, table, coefficients, out, logits.stride(0))
        + (0 if teacher is None else teacher.stride(0), out.stride(0), n, vocab, rows.shared)
        + rows.numbers,
        KIND=rows.kind,
        CAPPED=rows.capped,
        **rows.blocks,
    )


class _Rows:
    """What the launches of one call have in common."""

    def __init__(
        self, logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
    ):
        n, vocab = logits.shape
        self.count, self.device = n, logits.device
        self.shared = shared_columns(logits, teacher)
        section = section_length(vocab)
        self.inside = -(-self.shared // section)
        self.sections = self.inside + -(-(vocab - self.shared) // section)
        self.blocks = {"SECTION": section, "BLOCK": BLOCK, "num_warps": warps()}
        self.targets = logits.new_full((n,), NO_TARGET, dtype=torch.int64)
        if targets is not None:
            self.targets = targets
        kinds = {0.0: "forward", 1.0: "reverse"}
        self.kind = "none" if teacher is None else kinds.get(settings.beta, "mixture")
        self.capped = settings.softcap > 0 or (teacher is not None and settings.teacher_softcap > 0)
        self.inverse = 1.0 / settings.temperature
        self.teacher_inverse = 1.0 / settings.teacher_temperature
        self.numbers = (float(settings.beta), self.inverse, self.teacher_inverse)
        self.numbers += (float(settings.softcap), float(settings.teacher_softcap))

    def start(self, kernel, programs: int, arguments: tuple, **constants: object) -> None:
        """Starts `programs` for each row."""
        _start(kernel, (self.count, programs), self.device, *arguments, **constants)


def section_length(vocab: int) -> int:
    """Columns per section. One section fewer than there are lanes is for the cut at `shared`."""
    longest = SECTION
    while -(-vocab // longest) >= MOST_SECTIONS:
        longest *= 2
    return longest


def warps() -> int:
    """Warps of a program: those of AMD's data centre GPUs have 64 threads."""
    threads = 64 if torch.version.hip else 32
    return BLOCK // (COLUMNS_PER_THREAD * threads)


def _start(kernel, grid: tuple[int, ...], device: torch.device, *arguments, **constants) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # enable_fp_fusion: off by default from Triton 3.10 on; an upgrade must not change the bits.
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _check(logits: Tensor, targets: Tensor | None, teacher: Tensor | None) -> None:
    """What could make a kernel read out of bounds, once more."""
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


def _require(name: str, x: Tensor, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"triton_rows: {name} of shape {tuple(x.shape)}, stride {x.stride()}, {x.dtype} on "
            f"{x.device} does not fit the row contract (kepo_kernels/rows.py)"
        )
