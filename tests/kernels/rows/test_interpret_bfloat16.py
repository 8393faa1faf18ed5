"""bf16 under tests/interpret.py, against torch, and that the stock interpreter gets it wrong."""

import inspect

import pytest
import torch
from checks import unavailable
from interpret import unchecked
from torch import Tensor

if reason := unavailable("triton"):
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("not interpreted: the kernels run on a GPU", allow_module_level=True)

from kepo_kernels.rows.triton_math import jit, tl

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
LANES = 1024


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def bfloat16s(seed: int) -> Tensor:
    """Random bits: all exponents, subnormals, inf, NaN; neighbours in size in the second half."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (LANES,), generator=generator, dtype=torch.int16)
    numbers = torch.randn(LANES, generator=generator).to(BFLOAT16)
    bits = bits.view(BFLOAT16)
    bits[bits.isnan()] = torch.nan  # a quiet one: of a signalling one torch's fmin makes another
    return torch.cat([bits[: LANES // 2], numbers[LANES // 2 :]])


@jit
def convert(x, out, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(out + lanes, tl.load(x + lanes).to(out.dtype.element_ty))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    convert[(1,)](x, out, LANES=len(x))
    return out


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, FLOAT64], ids=str)
def test_every_bfloat16_is_widened_as_torch_does(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BFLOAT16)
    assert_same(converted(x, dtype), x.to(dtype))
    assert_same(converted(converted(x, dtype), BFLOAT16), x.to(dtype).to(BFLOAT16))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_bfloat16_is_rounded_to_nearest_even(dtype):
    bits = torch.randint(-(2**31), 2**31, (2**14,)).to(torch.int32)
    ties = torch.randint(-(2**15), 2**15, (2**14,)).to(torch.int32) * 2**16 + 2**15
    x = torch.cat([bits, ties]).view(FLOAT32).to(dtype)
    assert_same(converted(x, BFLOAT16), x.to(BFLOAT16))
    with unchecked():
        assert not torch.equal(converted(x, BFLOAT16).nan_to_num(), x.to(BFLOAT16).nan_to_num())


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 2**-8, 1.0),  # ties: to even, down and up
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 2**-8 + 2**-40, 1 + 2**-7),  # no tie, unless it is rounded to fp32 first
        (1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
        (3.4e38, INF),
        (-1e300, -INF),
        (1e-300, 0.0),
        (torch.nan, torch.nan),
    ],
    ids=str,
)
def test_float64_is_rounded_to_bfloat16_once(x, expected):
    actual = converted(torch.tensor([x], dtype=FLOAT64), BFLOAT16)
    assert_same(actual, torch.tensor([expected], dtype=BFLOAT16))


def test_integers_and_bfloat16():
    x = torch.arange(-400, 624, dtype=torch.int32)
    assert_same(converted(x, BFLOAT16), x.to(BFLOAT16))
    assert_same(converted(x.to(BFLOAT16), torch.int32), x.to(BFLOAT16).int())
    with unchecked():
        assert not torch.equal(converted(x, BFLOAT16), x.to(BFLOAT16))


@jit
def compute(x, y, out, OPERATION: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    elif OPERATION == "mul":
        result = a * b
    elif OPERATION == "div":
        result = a / b
    elif OPERATION == "neg":
        result = -a
    elif OPERATION == "abs":
        result = tl.abs(a)
    elif OPERATION == "minimum":
        result = tl.minimum(a, b)
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "clamp":
        result = tl.clamp(a, -b, b)
    elif OPERATION == "fma":
        result = tl.fma(a, b, a)
    elif OPERATION == "scalar":
        result = a * 3.0
    elif OPERATION == "less":
        result = a < b
    elif OPERATION == "equal":
        result = a == b
    elif OPERATION == "unordered":
        result = ~((a < b) | (a >= b))
    else:
        result = tl.where(a > b, a, b + 1.0)
    tl.store(out + lanes, result)


def computed(x: Tensor, y: Tensor, operation: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(LANES, dtype=dtype)
    compute[(1,)](x, y, out, operation, LANES)
    return out


# torch's bf16 and fp16 on a CPU compute in fp32 and round once.
IN_TORCH = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a.float() / b.float(),  # Triton has no narrower division
    "neg": lambda a, b: -a,
    "minimum": torch.fmin,
    "maximum": torch.fmax,
    "clamp": lambda a, b: torch.fmin(torch.fmax(a, -b), b),
    "fma": lambda a, b: (a.double() * b.double() + a.double()).to(a.dtype),
    "scalar": lambda a, b: a * 3.0,
    "less": torch.lt,
    "equal": torch.eq,
    "unordered": lambda a, b: a.isnan() | b.isnan(),
    "where": lambda a, b: torch.where(a > b, a, b + 1.0),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by the stock interpreter
@pytest.mark.parametrize("operation", IN_TORCH)
def test_arithmetic_in_bfloat16(operation):
    x, y = bfloat16s(1), bfloat16s(2)
    y[::7] = x[::7]
    x[1], y[1], x[2], y[2] = torch.nan, torch.nan, 0.0, -0.0
    expected = IN_TORCH[operation](x, y)
    assert_same(computed(x, y, operation, expected.dtype), expected)
    if operation == "div":
        return  # it is of fp32, which the stock interpreter knows
    with unchecked():
        actual = computed(x, y, operation, expected.dtype)
    assert not torch.equal(actual.float().nan_to_num(), expected.float().nan_to_num())


def test_bfloat16_keeps_its_sign_bit_out_of_abs():
    x = bfloat16s(1)
    assert_same(computed(x, x, "abs", BFLOAT16), x.abs())


def test_rounded_sums_are_seen_by_the_next_operation():
    """256 + 1 is 256 in bf16: twice in a row, not 258."""
    x, ones = torch.full((LANES,), 256.0, dtype=BFLOAT16), torch.ones(LANES, dtype=BFLOAT16)
    once = computed(x, ones, "add", BFLOAT16)
    assert (computed(once, ones, "add", FLOAT32) == 256).all()


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "minimum", "less", "where"])
def test_float16_needs_no_help(operation):
    x, y = (bfloat16s(seed).to(FLOAT16) for seed in (1, 2))
    expected = IN_TORCH[operation](x, y)
    assert_same(computed(x, y, operation, expected.dtype), expected)
    x = torch.randn(LANES).exp2() * torch.randn(LANES)
    with unchecked():
        assert_same(converted(x, FLOAT16), x.to(FLOAT16))


@jit
def multiply(x, y, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = row * SIZE + column
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place)))


def test_dot_of_bfloat16():
    x, y = torch.randn(16, 16).to(BFLOAT16), torch.randn(16, 16).to(BFLOAT16)
    out = torch.empty(16, 16)
    multiply[(1,)](x, y, out, 16)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)
    with unchecked():
        multiply[(1,)](x, y, out, 16)
    assert out.abs().max() > 1e6  # the product of the bit patterns


@jit
def reduce(x, out, OPERATION: tl.constexpr, LANES: tl.constexpr):
    numbers = tl.load(x + tl.arange(0, LANES))
    if OPERATION == "sum":
        tl.store(out, tl.sum(numbers, 0))
    elif OPERATION == "cumsum":
        tl.store(out + tl.arange(0, LANES), tl.cumsum(numbers, 0))
    elif OPERATION == "argmax":
        tl.store(out, tl.argmax(numbers, 0))
    elif OPERATION == "max":
        tl.store(out, tl.max(numbers, 0))
    else:
        tl.store(out, tl.sum(numbers.to(tl.float32), 0))


@pytest.mark.parametrize("operation", ["sum", "cumsum", "argmax"])
def test_reductions_of_bfloat16_are_refused(operation):
    source = inspect.getsource((tl.max if operation == "argmax" else getattr(tl, operation)).fn)
    if "_promote_bfloat16" in source:
        pytest.skip("this Triton widens it by itself, on a GPU too")
    x, out = -torch.ones(LANES).to(BFLOAT16), torch.empty(LANES)
    with pytest.raises(AssertionError, match=r"Ops of bfloat16.*expected float32, as of x\.to\(tl"):
        reduce[(1,)](x, out, operation, LANES)


@pytest.mark.parametrize(("operation", "expected"), [("max", -1.0), ("widened sum", -1024.0)])
def test_reductions_in_float32_are_not(operation, expected):
    x, out = -torch.ones(LANES).to(BFLOAT16), torch.empty(1)
    reduce[(1,)](x, out, operation, LANES)
    assert out == expected
