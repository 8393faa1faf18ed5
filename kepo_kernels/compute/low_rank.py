"""Products of a LoRA on the head: low-rank extra GEMMs; weight + scale b @ a is never formed.

low     (n, r) = scale x @ a^T
logits  (n, V) += low @ b^T
up      (n, r) = dlogits @ b
db      (V, r) += dlogits^T @ low
da      (r, H) += scale up^T @ x
dx      (n, H) += scale up @ a
"""

from torch import Tensor

from kepo_kernels.compute import gemm


def project_(
    logits: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, strip_rows: int
) -> Tensor:
    """Compute logits <- logits + low @ b^T; return low, in fp32 on a CPU (fp64 for fp64)."""
    wide = gemm.gradient_dtype(b.dtype)
    low = (x.to(wide) @ a.to(wide).T).mul_(scale)
    if logits.is_cuda and x.dtype == b.dtype:
        low = low.to(b.dtype)
    gemm.project_(logits, low, b, add=True, strip_rows=strip_rows)
    return low


def add_gradients_(
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dlogits: Tensor,
    x: Tensor,
    low: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    columns: Tensor | None,
    strip_rows: int,
) -> None:
    """Add the gradients that flow through the LoRA; None stands for those not needed."""
    wants_up = da is not None or dx is not None
    up = gemm.add_gradients_(db, dlogits, b, low, wants_up, columns, strip_rows)
    if up is None:
        return
    wide = gemm.gradient_dtype(b.dtype)
    up = up.to(wide).mul_(scale)
    if da is not None:
        da.addmm_(up.T, x.to(wide))
    if dx is not None:
        dx.add_((up @ a.to(wide)).to(dx.dtype))
