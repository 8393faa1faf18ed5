"""The row contract in C++ (csrc/), for CPU tensors of fp32 or bf16 logits.

The library is torch-free and found through ctypes; here it becomes two `torch.library` operators,
so that `torch.compile`, fake tensors and the profiler see it like any other. (They are defined by
hand: the first call of a `torch.library.custom_op` imports the whole compiler, 140 MiB of it.) It
starts as many threads as torch would (`torch.get_num_threads()`), or as many as the system gives;
each row is summed by one thread in a fixed order, so the result does not depend on their number.
`KEPO_CPU_ISA=baseline|avx2|avx512` overrides the choice of instruction set.
"""

import ctypes
import json
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kepo_kernels.rows.contract import NUM_STATS, RowSettings, RowStats, shared_columns

LIBRARY = Path(__file__).parents[1] / "_rows.so"
BUILD_INFO = LIBRARY.with_name("_build_info.json")
ISAS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _RowBatch(ctypes.Structure):
    """The ctypes mirror of `RowBatch` in csrc/rows.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("beta", ctypes.c_float),
        ("rest", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("teacher_temperature", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("teacher_softcap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for function in (library.kepo_row_forward, library.kepo_row_backward):
        function.argtypes = [ctypes.POINTER(_RowBatch), ctypes.c_int32, ctypes.c_int32]
        function.restype = None
    library.kepo_best_isa.restype = ctypes.c_int32
    return library


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Return why the C++ rows cannot be used here, or None if they can."""
    if not LIBRARY.exists():
        reason = "the C++ library was not built"
        if BUILD_INFO.exists():
            error = json.loads(BUILD_INFO.read_text(encoding="utf-8")).get("error")
            reason += f": {error}" if error else ""
        return reason
    try:
        layout = _library().kepo_layout()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} does not load: {error}"
    if layout != 1000 * NUM_STATS + ctypes.sizeof(_RowBatch):
        return f"{LIBRARY.name} was built from other sources; install again (pip install -e .)"
    return None


def isa() -> str:
    """Return the instruction set in use: `KEPO_CPU_ISA` if set, else the best this processor
    has."""
    best = _library().kepo_best_isa()
    wanted = os.environ.get("KEPO_CPU_ISA")
    if wanted is None:
        return ISAS[best]
    if wanted not in ISAS[: best + 1]:
        raise ValueError(
            f"KEPO_CPU_ISA={wanted!r}: this processor runs {', '.join(ISAS[: best + 1])}"
        )
    return wanted


def row_forward(
    logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
) -> Tensor:
    """Implement `row_forward` of `kepo_kernels.rows.contract`."""
    return torch.ops.kepo_kernels.row_forward(logits, targets, teacher, *settings)


def row_backward_(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor,
    settings: RowSettings,
    out: Tensor | None = None,
) -> None:
    """Implement `row_backward_` of `kepo_kernels.rows.contract`."""
    torch.ops.kepo_kernels.row_backward_(logits, targets, teacher, table, coefficients, *settings)
    if out is not None:
        out.copy_(logits)


def _forward_op(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
) -> Tensor:
    table = torch.empty(NUM_STATS, logits.shape[0], dtype=torch.float32)
    settings = RowSettings(beta, temperature, teacher_temperature, softcap, teacher_softcap)
    batch = _batch(logits, targets, teacher, table, None, settings)
    _library().kepo_row_forward(batch, torch.get_num_threads(), ISAS.index(isa()))
    return table


def _backward_op(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    softcap: float,
    teacher_softcap: float,
) -> None:
    settings = RowSettings(beta, temperature, teacher_temperature, softcap, teacher_softcap)
    batch = _batch(logits, targets, teacher, table, coefficients, settings)
    _library().kepo_row_backward(batch, torch.get_num_threads(), ISAS.index(isa()))
    if not logits.is_inference():  # such a tensor counts no versions
        torch.autograd.graph.increment_version(logits)


SETTINGS = ", ".join(f"float {name}" for name in RowSettings._fields)
FORWARD = f"row_forward(Tensor logits, Tensor? targets, Tensor? teacher, {SETTINGS}) -> Tensor"
BACKWARD = (
    "row_backward_(Tensor(a!) logits, Tensor? targets, Tensor? teacher, Tensor table, "
    f"Tensor coefficients, {SETTINGS}) -> ()"
)


def _fake_forward(logits: Tensor, *others: object) -> Tensor:
    return logits.new_empty(NUM_STATS, logits.shape[0], dtype=torch.float32)


_OPERATORS = torch.library.Library("kepo_kernels", "FRAGMENT")
for _schema, _kernel, _fake in (
    (FORWARD, _forward_op, _fake_forward),
    (BACKWARD, _backward_op, lambda *of_all: None),
):
    _name = _schema[: _schema.index("(")]
    _OPERATORS.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _OPERATORS.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"kepo_kernels::{_name}", _fake, lib=_OPERATORS)


def _batch(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor | None,
    settings: RowSettings,
) -> _RowBatch:
    """Build the C struct of the call.

    Everything that could make the kernel read out of bounds is checked here again.
    """
    named = ("targets", targets), ("teacher", teacher), ("table", table)
    for name, x in (("logits", logits), *named, ("coefficients", coefficients)):
        if x is not None:
            _require(name, x, "a CPU tensor", x.device.type == "cpu")
    expected = "(n, V) of float32 or bfloat16"
    _require("logits", logits, expected, logits.dtype in DTYPES and logits.dim() == 2)
    rows, shared = logits.shape[0], logits.shape[1]
    if teacher is not None:
        expected = f"{logits.dtype} of shape ({rows}, V_t), V_t > 0"
        fits = teacher.dtype == logits.dtype and teacher.dim() == 2
        _require("teacher", teacher, expected, fits)
        shared = shared_columns(logits, teacher)
        _require("teacher", teacher, expected, teacher.shape[0] == rows and shared > 0)
    if targets is not None:
        fits = targets.dtype == torch.int64 and targets.shape == (rows,)
        expected = f"contiguous int64 of shape {(rows,)}"
        _require("targets", targets, expected, fits and targets.is_contiguous())
        _require_ids("targets", targets, logits.shape[1])
    for name, x, width in (("table", table, NUM_STATS), ("coefficients", coefficients, 3)):
        if x is not None:
            fits = x.dtype == torch.float32 and x.shape == (width, rows)
            expected = f"contiguous float32 of shape {(width, rows)}"
            _require(name, x, expected, fits and x.is_contiguous())
    if teacher is not None and coefficients is not None:  # the backward, which reads this column
        _require_ids("table's peak_token", RowStats(*table).peak_token, shared)
    for name, x in (("logits", logits), ("teacher", teacher)):
        if x is not None:
            _require(name, x, "columns side by side", x.stride(-1) == 1 or x.shape[-1] == 1)
    return _RowBatch(
        _pointer(logits),
        _pointer(teacher),
        _pointer(targets),
        _pointer(table),
        _pointer(coefficients),
        rows,
        logits.shape[1],
        shared,
        logits.stride(0),
        0 if teacher is None else teacher.stride(0),
        settings.beta,
        1.0 - settings.beta,
        *settings[1:],
        DTYPES[logits.dtype],
    )


def _require(name: str, x: Tensor, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"cpu_rows: {name} has shape {tuple(x.shape)}, stride {x.stride()}, {x.dtype} on "
            f"{x.device}; expected {expected} (kepo_kernels/rows/contract.py)"
        )


def _require_ids(name: str, ids: Tensor, columns: int) -> None:
    """Check that ids (n,) are columns that exist; NaN is not one."""
    bad = (ids >= 0).logical_and_(ids < columns).logical_not_()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"cpu_rows: {name} holds {ids[row].item()} in row {row}; expected ids in [0, {columns})"
        )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
