"""The three matrix products of a linear head, for every pairing of operand and logits dtype.

    logits  (n, V) = x (n, H) @ w (V, H)^T + bias
    dx      (n, H) = dlogits (n, V) @ w
    dw      (V, H) += dlogits^T @ x          fp32 (fp64 for fp64), downcast once by the caller

When operands and logits share a dtype these are plain `mm`. 16-bit operands with fp32 logits are
`mm(out_dtype=)` on CUDA. CPU torch has no such product, and on processors without bf16 instructions
its bf16 `mm` is 5 to 150 times slower than fp32; there a strip of the head at a time is cast to
fp32 and multiplied as fp32, which is both the faster and the more exact way.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of one upcast strip of a head: it stays in cache and costs little beside the logits.
STRIP_BYTES = 8 << 20


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


def project_(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """out <- x @ w^T + bias; the product, and then the sum, are rounded to the dtype of `out`."""
    if _same(x, out):
        torch.mm(x, w.T, out=out)
    elif x.is_cuda:
        torch.mm(x, w.T, out_dtype=out.dtype, out=out)
    else:
        x = x.float()
        for columns, strip in _strips(w):
            if out.dtype == torch.float32:
                torch.mm(x, strip.T, out=out[:, columns])
            else:
                out[:, columns] = x @ strip.T
    if bias is not None:
        out += bias.to(out.dtype)


def hidden_gradient(dlogits: Tensor, w: Tensor) -> Tensor:
    """dlogits @ w, in fp32 where the product is formed in fp32, else in the dtype of `w`."""
    if _same(w, dlogits):
        return dlogits @ w
    if w.is_cuda:
        return dlogits.to(w.dtype) @ w
    dx = torch.zeros(dlogits.shape[0], w.shape[1], dtype=torch.float32, device=w.device)
    for columns, strip in _strips(w):
        dx.addmm_(dlogits[:, columns].float(), strip)
    return dx


def accumulate_head_(dw: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """dw <- dw + dlogits^T @ x."""
    if dw.dtype == dlogits.dtype == x.dtype:
        dw.addmm_(dlogits.T, x)
    elif x.is_cuda:
        torch.addmm(dw, dlogits.to(x.dtype).T, x, out_dtype=dw.dtype, out=dw)
    elif _same(x, dlogits):
        for rows in _ranges(dw):
            dw[rows] += dlogits[:, rows].T @ x
    elif dlogits.dtype == dw.dtype:
        dw.addmm_(dlogits.T, x.to(dw.dtype))
    else:
        x = x.float()
        for rows in _ranges(dw):
            dw[rows].addmm_(dlogits[:, rows].float().T, x)


def _same(operand: Tensor, logits: Tensor) -> bool:
    """Whether the product is one plain `mm` of tensors of one dtype."""
    if operand.dtype != logits.dtype:
        return False
    return operand.dtype != torch.bfloat16 or fast_bf16(operand.device)


def _strips(w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in fp32, some rows at a time, in one reused buffer."""
    ranges = _ranges(w)
    buffer = w.new_empty(ranges[0].stop if ranges else 0, w.shape[1], dtype=torch.float32)
    for rows in ranges:
        yield rows, buffer[: rows.stop - rows.start].copy_(w[rows])


def _ranges(w: Tensor) -> list[slice]:
    height = max(64, STRIP_BYTES // (4 * w.shape[1]))
    return [slice(start, min(start + height, len(w))) for start in range(0, len(w), height)]
