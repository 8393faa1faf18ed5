"""The matrix products of a linear head, for every pairing of operand and logits dtype.

    logits  (n, V) = x (n, H) @ w (V, H)^T + bias
    dx      (n, H) = dlogits (n, V) @ w
    dw      (V, H) += dlogits^T @ x          fp32 (fp64 for fp64), downcast once by the caller

When operands and logits share a dtype these are plain `mm`. 16-bit operands with fp32 results are
`mm(out_dtype=)` on CUDA, dx among them: in 16 bits it would be rounded twice. CPU torch has no such
product, and on processors without bf16 instructions its bf16 `mm` is 5 to 150 times slower than
fp32; there a strip of the head at a time is cast to fp32 and multiplied as fp32, which is both the
faster and the more exact way. So is, on either device, a 16-bit head under fp32 states. The two
gradient products also run over chosen `columns` of the logits, as if dlogits were 0 in the others.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one upcast strip of a head: it stays in cache and costs little beside the logits.
STRIP_BYTES = 2 << 20
LEAST_STRIP_ROWS, MOST_STRIP_ROWS = 64, 4096


def fast_bf16(device: torch.device) -> bool:
    """Return whether this device multiplies bf16 matrices at least as fast as fp32 ones.

    A CPU does if it has instructions for that, and if oneDNN, which multiplies for torch, was not
    told not to use them (ONEDNN_MAX_CPU_ISA).
    """
    if device.type != "cpu":
        return True
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has_them = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return has_them and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def operand_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the dtype of states in products with heads and LoRAs of these dtypes: the common dtype
    if there is only one, else fp32."""
    (one,) = dtypes if len(dtypes) == 1 else (torch.float32,)
    return one


def default_logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the default dtype of logits: fp64 for fp64; bf16 on CPUs that multiply bf16 fast only
    if the result stays bf16; else fp32."""
    if dtype == torch.float64:
        return dtype
    if dtype == torch.bfloat16 and device.type == "cpu" and fast_bf16(device):
        return dtype
    return torch.float32


def dlogits_dtype(
    dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Return the dtype of the logits' gradient in products with operands of `dtype`.

    On CUDA that is the dtype of the operands: written so by the row kernel, it is never converted.
    """
    return dtype if device.type == "cuda" else logits_dtype


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the head's gradient is summed over chunks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_product(dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether each product is one `mm` of one dtype, without strips or upcasts."""
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
    elif x.is_cuda and x.dtype == w.dtype:
        if add:
            torch.addmm(out, x, w.T, out_dtype=out.dtype, out=out)
        else:
            torch.mm(x, w.T, out_dtype=out.dtype, out=out)
    else:
        x = x.float()
        for columns, strip in _strips(w, strip_rows):
            # Multiplied into the columns of `out` directly, each strip takes a tenth longer.
            if add:
                out[:, columns] += x @ strip.T
            else:
                out[:, columns] = x @ strip.T
    if bias is not None:
        out += bias.to(out.dtype)


def add_gradients_(
    dw: Tensor | None,
    dlogits: Tensor,
    w: Tensor,
    x: Tensor,
    wants_dx: bool,
    columns: Tensor | None = None,
    strip_rows: int | None = None,
    first: bool = False,
) -> Tensor | None:
    """Compute dw <- dw + dlogits^T @ x if dw is given; return dlogits @ w, or None if not wanted.

    The products run over all columns of dlogits, or over the chosen ones, as if it were 0 in the
    others. `first`: dw holds nothing yet (see `accumulate_head_`).
    """
    if columns is None:
        dx = hidden_gradient(dlogits, w, strip_rows) if wants_dx else None
        if dw is not None:
            accumulate_head_(dw, dlogits, x, strip_rows, first)
        return dx
    wide = gradient_dtype(w.dtype)
    dx = torch.zeros(len(dlogits), w.shape[1], dtype=wide, device=w.device) if wants_dx else None
    x = x.to(wide)
    for part in columns.split(strip_rows or default_strip_rows(w.shape[1], w.dtype)):
        # 16-bit products take half of the time, but round dx once a strip, for 3x the error.
        chosen = dlogits.gather(1, part.expand(len(dlogits), -1)).to(wide)
        if dx is not None:
            dx.addmm_(chosen, w.index_select(0, part).to(wide))
        if dw is not None:  # no id occurs twice, so every element is written once
            dw[part] = dw.index_select(0, part).addmm_(chosen.T, x)
        del chosen  # before the next one is allocated
    return dx


def hidden_gradient(dlogits: Tensor, w: Tensor, strip_rows: int | None = None) -> Tensor:
    """Return dlogits @ w, in fp32 where the product is formed in fp32, else in `w`'s dtype."""
    if w.is_cuda and w.dtype.itemsize == 2 and dlogits.dtype == w.dtype:
        return torch.mm(dlogits, w, out_dtype=torch.float32)
    if _same(w, dlogits):
        return dlogits @ w
    wide = gradient_dtype(w.dtype)
    dx = torch.zeros(dlogits.shape[0], w.shape[1], dtype=wide, device=w.device)
    for columns, strip in _strips(w, strip_rows):
        dx.addmm_(dlogits[:, columns].to(wide), strip)
    return dx


def writes_first(device: torch.device) -> bool:
    """Return whether the first chunk's product is written over dw, which then need not be zero.

    On a CPU it is not: pages must be touched once before a product fills them, which zeroing does.
    """
    return device.type == "cuda"


def accumulate_head_(
    dw: Tensor, dlogits: Tensor, x: Tensor, strip_rows: int | None = None, first: bool = False
) -> None:
    """dw <- dw + dlogits^T @ x; with `first`, dw <- dlogits^T @ x if `writes_first` says so."""
    first &= writes_first(dw.device)
    if dw.dtype == dlogits.dtype == x.dtype:
        torch.mm(dlogits.T, x, out=dw) if first else dw.addmm_(dlogits.T, x)
    elif x.is_cuda:
        dlogits = dlogits.to(x.dtype).T
        if first:
            torch.mm(dlogits, x, out_dtype=dw.dtype, out=dw)
        else:
            torch.addmm(dw, dlogits, x, out_dtype=dw.dtype, out=dw)
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


def _strips(w: Tensor, height: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the head in the dtype of its gradient, some rows at a time, in one reused buffer."""
    ranges = _ranges(w, height)
    longest = ranges[0].stop if ranges else 0
    buffer = w.new_empty(longest, w.shape[1], dtype=gradient_dtype(w.dtype))
    for rows in ranges:
        yield rows, buffer[: rows.stop - rows.start].copy_(w[rows])


def default_strip_rows(width: int, dtype: torch.dtype, strip_bytes: int | None = None) -> int:
    """Return the number of rows of a head (V, width) in a strip of so many bytes (None =
    STRIP_BYTES)."""
    strip_bytes = STRIP_BYTES if strip_bytes is None else min(STRIP_BYTES, strip_bytes)
    fitting = strip_bytes // (gradient_dtype(dtype).itemsize * max(1, width))
    return min(max(LEAST_STRIP_ROWS, fitting), MOST_STRIP_ROWS)


def _ranges(w: Tensor, height: int | None = None) -> list[slice]:
    height = height or default_strip_rows(w.shape[1], w.dtype)
    return [slice(start, min(start + height, len(w))) for start in range(0, len(w), height)]
