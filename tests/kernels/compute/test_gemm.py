"""The three matrix products, for every pairing of operand and logits dtype on a CPU."""

import pytest
import torch
from checks import assert_close_to_oracle
from torch import Tensor

from kepo_kernels.compute import gemm

FLOAT64, FLOAT32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# (operands, logits): alike, 16-bit operands with wider logits, and bf16 throughout.
PAIRS = ((FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (BF16, FLOAT32), (FP16, FLOAT32), (BF16, BF16))
# 203 rows in strips of 64, the least there is: three whole ones and a part.
ROWS, HIDDEN, VOCAB = 7, 33, 203


@pytest.fixture(params=["one strip", "four strips"])
def strips(request, monkeypatch) -> int:
    """The head is taken a strip at a time; how many are as told."""
    if request.param == "four strips":
        monkeypatch.setattr(gemm, "STRIP_BYTES", 1)
    count = len(gemm._ranges(torch.empty(VOCAB, HIDDEN)))
    assert count == (4 if request.param == "four strips" else 1)
    return count


@pytest.fixture(params=[False, True], ids=["strips for bf16", "mm for bf16"])
def fast(request, monkeypatch) -> bool:
    """As on a processor without bf16 instructions, and as on one with them."""
    monkeypatch.setattr(gemm, "fast_bf16", lambda device: request.param)
    return request.param


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64).to(dtype)


def assert_rounded(actual: Tensor, oracle: Tensor, logits: torch.dtype, name: str) -> None:
    """To the tolerance of the dtype; bf16 logits may have rounded their parts as well."""
    if logits == BF16:
        floor = (oracle.to(BF16).double() - oracle).norm()
        assert 0 < (actual.double() - oracle).norm() <= 2.0 * floor, name
    else:
        assert_close_to_oracle(actual, oracle, name=name)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("operands", "logits"), PAIRS, ids=str)
def test_project(operands, logits, with_bias, strips, fast):
    x, w = normal(ROWS, HIDDEN, dtype=operands), normal(VOCAB, HIDDEN, dtype=operands)
    bias = normal(VOCAB, dtype=operands) if with_bias else None
    oracle = x.double() @ w.double().T + (bias.double() if with_bias else 0)
    # A slice of a larger buffer, as the workspace is, that starts as NaN.
    out = torch.full((ROWS + 2, VOCAB), torch.nan, dtype=logits)
    gemm.project_(out[:ROWS], x, w, bias)
    assert_rounded(out[:ROWS], oracle, logits, "logits")
    assert out[ROWS:].isnan().all()


@pytest.mark.parametrize(("operands", "logits"), PAIRS, ids=str)
def test_hidden_gradient(operands, logits, strips, fast):
    dlogits, w = normal(ROWS, VOCAB, dtype=logits), normal(VOCAB, HIDDEN, dtype=operands)
    dx = gemm.hidden_gradient(dlogits, w)
    # In fp32 where the product is formed in fp32: it is then rounded once, by autograd.
    in_strips = operands != logits or (operands == BF16 and not fast)
    assert dx.dtype == (FLOAT32 if in_strips else operands)
    assert_rounded(dx, dlogits.double() @ w.double(), dx.dtype, "dx")


@pytest.mark.parametrize(("operands", "logits"), PAIRS, ids=str)
def test_accumulate_head(operands, logits, strips, fast):
    """Added to what is there, in the dtype of the sum: fp32 also where the product is bf16."""
    dlogits, x = normal(ROWS, VOCAB, dtype=logits), normal(ROWS, HIDDEN, dtype=operands)
    start = normal(VOCAB, HIDDEN, dtype=gemm.gradient_dtype(operands))
    dw = start.clone()
    gemm.accumulate_head_(dw, dlogits, x)
    product = dlogits.double().T @ x.double()
    if operands == logits == BF16 and fast:
        assert_rounded((dw.double() - start.double()), product, BF16, "dw")
    else:
        assert_close_to_oracle(dw, start.double() + product, name="dw")


def test_strips_cover_the_head_once():
    w = normal(VOCAB, HIDDEN, dtype=BF16)
    rows = torch.zeros(VOCAB)
    for part, strip in gemm._strips(w):
        rows[part] += 1
        assert strip.dtype == FLOAT32 and torch.equal(strip, w[part].float())
    assert (rows == 1).all()


def test_strips_stay_small(monkeypatch):
    monkeypatch.setattr(gemm, "STRIP_BYTES", 64 * 1024)
    w = normal(5000, 32, dtype=BF16)
    sizes = [strip.numel() * 4 for _, strip in gemm._strips(w)]
    assert max(sizes) == 64 * 1024 and len(sizes) == 10


def test_products_of_no_rows(fast):
    for operands, logits in PAIRS:
        x, w = normal(0, HIDDEN, dtype=operands), normal(VOCAB, HIDDEN, dtype=operands)
        out = torch.empty(0, VOCAB, dtype=logits)
        gemm.project_(out, x, w, None)
        assert gemm.hidden_gradient(out, w).shape == (0, HIDDEN)
        dw = torch.ones(VOCAB, HIDDEN, dtype=gemm.gradient_dtype(operands))
        gemm.accumulate_head_(dw, out, x)
        assert torch.equal(dw, torch.ones_like(dw))


def test_dtypes():
    cpu = torch.device("cpu")
    assert [gemm.gradient_dtype(d) for d in (FLOAT64, FLOAT32, BF16, FP16)] == [FLOAT64] + [
        FLOAT32
    ] * 3
    assert gemm.default_logits_dtype(FLOAT64, cpu) == FLOAT64
    assert gemm.default_logits_dtype(FLOAT32, cpu) == FLOAT32
    assert gemm.default_logits_dtype(FP16, cpu) == FLOAT32
    assert gemm.default_logits_dtype(BF16, cpu) == (BF16 if gemm.fast_bf16(cpu) else FLOAT32)
    assert gemm.default_logits_dtype(BF16, torch.device("cuda")) == FLOAT32
