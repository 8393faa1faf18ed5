"""The back-ends of the row contract, and calls of their row functions."""

from dataclasses import dataclass
from types import ModuleType

import torch
from checks import RowProblem, assert_rows_right, run_rows
from torch import Tensor

from kepo_kernels.rows.contract import RowSettings

INF = float("inf")
FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
KINDS = (0.0, 0.1, 1.0)  # one beta for each formula

BACK_ENDS = (
    *(("torch", dtype) for dtype in (FLOAT32, FLOAT64, BFLOAT16)),
    *((f"cpu-{isa}", t) for isa in ("baseline", "avx2", "avx512") for t in (FLOAT32, BFLOAT16)),
    # Triton's interpreter truncates fp32 to bf16. That the tests see these gradients rounded, as a
    # GPU rounds them, is the doing of `interpret.checked`.
    *(("triton", dtype) for dtype in (FLOAT32, BFLOAT16)),
)


@dataclass(frozen=True)
class BackEnd:
    rows: ModuleType
    dtype: torch.dtype
    device: str


def check(back_end: BackEnd, problem: RowProblem, *settings: float, **more: float) -> None:
    assert_rows_right(back_end.rows, problem, both_at(*settings, **more), back_end.device)


def run(
    back_end: BackEnd, problem: RowProblem, *settings: float, **more: float
) -> tuple[Tensor, Tensor]:
    return run_rows(back_end.rows, problem, both_at(*settings, **more), back_end.device)


def both_at(beta: float, temperature: float = 1.0, **more: float) -> RowSettings:
    """Student and teacher at one temperature, unless it is said otherwise."""
    return RowSettings(beta, temperature, **{"teacher_temperature": temperature} | more)
