"""The matrix products of a linear head, for every pairing of operand and logits dtype.

    logits  (n, V) = x (n, H) @ w (V, H)^T + bias
    dx      (n, H) = dlogits (n, V) @ w
    dw      (V, H) += dlogits^T @ x          fp32 (fp64 for fp64), downcast once by the caller

When operands and logits share a dtype these are plain `mm`. 16-bit operands with fp32 logits are
`mm(out_dtype=)` on CUDA. CPU torch has no such product, and on processors without bf16 instructions
its bf16 `mm` is 5 to 150 times slower than fp32; there a strip of the head at a time is cast to
fp32 and multiplied as fp32, which is both the faster and the more exact way. The two gradient
products also run over chosen `columns` of the logits, as if dlogits were 0 in the others.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of one upcast strip of a head: it stays in cache and costs little beside the logits.
STRIP_BYTES = 8 << 20
LEAST_STRIP_ROWS, MOST_STRIP_ROWS = 64, 4096


def fast_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices at least as fast as fp32 ones."""
    if device.type != "cpu":
        return True
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def default_logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """fp64 for fp64; bf16 on CPUs that only multiply bf16 fast when it stays bf16; else fp32."""
    if dtype == torch.float64:
        return dtype
    if dtype == torch.bfloat16 and device.type == "cpu" and fast_bf16(device):
        return dtype
    return torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the head's gradient is summed over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_product(dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether each product is one `mm` of tensors of one dtype: neither strips nor upcasts."""
    if dtype != logits_dtype:
        return False
    return dtype != torch.bfloat16 or fast_bf16(device)


def project_(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    add: bool = False,
    strip_rows: int | None = None,
) -> None:
    """out <- x @ w^T + bias (`add`: + out); product and sums are rounded to the dtype of `out`."""
    if _same(w, out):
        x = x.to(w.dtype)
        out.addmm_(x, w.T) if add else torch.mm(x, w.T, out=out)
    elif x.is_cuda:
        x = x.to(w.dtype)
        if add:
            torch.addmm(out, x, w.T, out_dtype=out.dtype, out=out)
        else:
            torch.mm(x, w.T, out_dtype=out.dtype, out=out)
    else:
        x = x.float()
        for columns, strip in _strips(w, None, strip_rows):
            # Multiplied into the columns of `out` directly, each strip takes a tenth longer.
            product = x @ strip.T
            if add:
                out[:, columns] += product
            else:
                out[:, columns] = product
    if bias is not None:
        out += bias.to(out.dtype)


def hidden_gradient(
    dlogits: Tensor,
    w: Tensor,
    columns: Tensor | None = None,
    strip_rows: int | None = None,
) -> Tensor:
    """dlogits @ w, in fp32 where the product is formed in fp32, else in the dtype of `w`."""
    if columns is None and _same(w, dlogits):
        return dlogits @ w
    if columns is None and w.is_cuda:
        return dlogits.to(w.dtype) @ w
    dtype = gradient_dtype(w.dtype)
    dx = torch.zeros(dlogits.shape[0], w.shape[1], dtype=dtype, device=w.device)
    for part, strip in _strips(w, columns, strip_rows):
        dx.addmm_(_columns(dlogits, part, dtype), strip)
    return dx


def accumulate_head_(
    dw: Tensor,
    dlogits: Tensor,
    x: Tensor,
    columns: Tensor | None = None,
    strip_rows: int | None = None,
) -> None:
    """dw <- dw + dlogits^T @ x."""
    if columns is not None:
        x = x.to(dw.dtype)
        for part in _parts(dw, columns, strip_rows):
            # No id occurs twice, so the order of the additions is fixed on every device.
            dw.index_add_(0, part, _columns(dlogits, part, dw.dtype).T @ x)
    elif dw.dtype == dlogits.dtype == x.dtype:
        dw.addmm_(dlogits.T, x)
    elif x.is_cuda:
        torch.addmm(dw, dlogits.to(x.dtype).T, x, out_dtype=dw.dtype, out=dw)
    elif _same(x, dlogits):
        for rows in _ranges(dw, strip_rows):
            dw[rows] += dlogits[:, rows].T @ x
    elif dlogits.dtype == dw.dtype:
        dw.addmm_(dlogits.T, x.to(dw.dtype))
    else:
        x = x.float()
        for rows in _ranges(dw, strip_rows):
            dw[rows].addmm_(dlogits[:, rows].float().T, x)


def _same(operand: Tensor, logits: Tensor) -> bool:
    return one_product(operand.dtype, logits.dtype, operand.device)


def _columns(dlogits: Tensor, part: slice | Tensor, dtype: torch.dtype) -> Tensor:
    chosen = dlogits[:, part] if isinstance(part, slice) else dlogits.index_select(1, part)
    return chosen.to(dtype)


def _strips(
    w: Tensor, columns: Tensor | None = None, height: int | None = None
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Rows of the head in the dtype of its gradient, some at a time, in one reused buffer."""
    height = min(len(w), height or default_strip_rows(w.shape[1], w.dtype))
    buffer = w.new_empty(height, w.shape[1], dtype=gradient_dtype(w.dtype))
    for part in _parts(w, columns, height):
        if isinstance(part, slice):
            yield part, buffer[: part.stop - part.start].copy_(w[part])
        else:
            yield part, buffer[: len(part)].copy_(w.index_select(0, part))


def default_strip_rows(width: int, dtype: torch.dtype, strip_bytes: int | None = None) -> int:
    """How many rows of a head (V, width) make a strip of so many bytes (None = STRIP_BYTES)."""
    strip_bytes = STRIP_BYTES if strip_bytes is None else min(STRIP_BYTES, strip_bytes)
    fitting = strip_bytes // (gradient_dtype(dtype).itemsize * max(1, width))
    return min(max(LEAST_STRIP_ROWS, fitting), MOST_STRIP_ROWS)


def _parts(w: Tensor, columns: Tensor | None, height: int | None) -> list[slice | Tensor]:
    if columns is None:
        return _ranges(w, height)
    height = height or default_strip_rows(w.shape[1], w.dtype)
    return list(columns.split(height)) if len(columns) else []


def _ranges(w: Tensor, height: int | None = None) -> list[slice]:
    height = height or default_strip_rows(w.shape[1], w.dtype)
    return [slice(start, min(start + height, len(w))) for start in range(0, len(w), height)]
