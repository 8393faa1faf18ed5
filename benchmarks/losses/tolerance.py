"""What `grad_tol` leaves out, and what that does to the gradient; what bf16 logits do to a KL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import kepo_kernels
from benchmarks.losses import table
from benchmarks.losses.losses_of_ours import CASES, ours
from benchmarks.losses.measure import Quantiles
from benchmarks.losses.problems import Problem
from kepo_kernels.compute import sparsity

EXACT = {"kd_tol": "kd_open", "grpo_tol": "grpo"}
SIDES = ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head")
BETAS = {0.0: "KL(teacher|student)", 0.5: "JSD", 1.0: "KL(student|teacher)"}


class Tolerance(NamedTuple):
    """What a `.._tol` case does to its gradients."""

    hidden: float
    """Relative L2 distance of dhidden from the exact call's."""
    lm_head: float
    """The same of dlm_head."""
    kept: float
    """Share of the columns of dlogits that the gradient products go over."""
    needed: float
    """Share that the tolerance asks for: where it is more than a half, all are kept."""

    @property
    def note(self) -> str:
        return (
            f"dhidden off by {self.hidden:.1e}, dlm_head by {self.lm_head:.1e}; "
            f"{self.kept:.1%} of the columns kept"
        )

    def rows(self, case: str, grad_tol: str = "") -> list[table.Row]:
        """Return them as rows of results; `grad_tol` is named if it is not the run's."""
        error = max(self.hidden, self.lm_head)
        target = None if grad_tol else table.GRADIENT_ERROR
        title, at = CASES[case], f"@{grad_tol}" if grad_tol else ""
        return [
            table.ratio_row(
                f"{case}{at}/gradient_error",
                Quantiles.of([error]),
                target,
                f"{title}{at}: gradient's relative error",
            ),
            *(
                table.ratio_row(
                    f"{case}{at}/{what}_columns",
                    Quantiles.of([getattr(self, what)]),
                    None,
                    f"{title}{at}: share of columns {what}",
                )
                for what in ("kept", "needed")
            ),
        ]


def tolerance(problem: Problem, case: str, grad_tol: float) -> Tolerance:
    exact = ours(problem, EXACT[case])()
    with _counted() as counts:
        found = ours(problem, case, grad_tol)()
    errors = (
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(found, exact, strict=True)
    )
    rows = sum(part for part, _, _ in counts)
    kept, needed = (sum(part[0] * part[i] for part in counts) / max(1, rows) for i in (1, 2))
    return Tolerance(*errors, kept, needed)


@contextmanager
def _counted() -> Iterator[list[tuple[int, float, float]]]:
    """Rows of every choice of columns, the share that it kept and the share that was needed."""
    counts: list[tuple[int, float, float]] = []
    choose, worthwhile = sparsity.heavy_columns, sparsity.WORTHWHILE

    def counting(dlogits: Tensor, grad_tol: float) -> tuple[Tensor | None, sparsity.Mass]:
        columns, mass = choose(dlogits, grad_tol)
        sparsity.WORTHWHILE = 1.0
        needed, _ = choose(dlogits, grad_tol)
        sparsity.WORTHWHILE = worthwhile
        share = [1.0 if one is None else len(one) / dlogits.shape[1] for one in (columns, needed)]
        counts.append((len(dlogits), *share))
        return columns, mass

    sparsity.heavy_columns = counting
    try:
        yield counts
    finally:
        sparsity.heavy_columns, sparsity.WORTHWHILE = choose, worthwhile


def kl_bias(problem: Problem) -> list[table.Row]:
    """Return rows that tell by what share of itself the mean divergence is too large in bf16, and
    how far a token is off. `problem` is float32.

    bf16_states: states and heads rounded, logits in float32, against float64 of what was not
    rounded. bf16_logits: logits rounded as well, against float64 of the rounded states and heads.
    bf16_all: both, against float64 of what was not rounded.
    """
    exact = {name: getattr(problem, name).detach() for name in SIDES}
    rounded = {name: x.bfloat16() for name, x in exact.items()}
    bf16 = torch.bfloat16
    found: list[table.Row] = []
    for beta, title in BETAS.items():
        truth, of_rounded = (_divergence(x, beta, torch.float64) for x in (exact, rounded))
        for what, against, got in (
            ("float32", truth, _divergence(exact, beta)),
            ("bf16_states", truth, _divergence(rounded, beta)),
            ("bf16_logits", of_rounded, _divergence(rounded, beta, logits_dtype=bf16)),
            ("bf16_all", truth, _divergence(rounded, beta, logits_dtype=bf16)),
        ):
            off, mean = got - against, float(against.mean())
            rms = float(off.square().mean().sqrt()) / mean
            note = f"{title}, mean {mean:.2e}: bias by {what}; rms of a token {rms:.1e}"
            bias = float(off.mean()) / mean
            found.append(table.ratio_row(f"kl_{beta:g}/{what}", Quantiles.of([bias]), None, note))
    return found


@torch.no_grad()
def _divergence(
    sides: dict[str, Tensor],
    beta: float,
    dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = torch.float32,
) -> Tensor:
    """The divergence of every token in float64; `dtype` is that of the inputs, None = as it is."""
    given = {name: x.to(dtype) for name, x in sides.items()} if dtype else sides
    logits_dtype = None if dtype == torch.float64 else logits_dtype
    found = kepo_kernels.fused_linear_divergence(**given, beta=beta, logits_dtype=logits_dtype)
    return found.double()
