"""bf16 for Triton's interpreter, to which it is 16 bits without a meaning.

Every operation computes on the values, in fp32 or wider, and rounds the result to nearest, ties to
even. fp32 is wide enough for that to be the rounding of the exact sum, product or quotient. A sum
over many numbers is rounded at each step, in an order that on a GPU depends on the layout, so that
reductions and scans of bf16 are refused instead.
"""

from collections.abc import Callable, Mapping

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def replacements(stock: Mapping[str, Callable]) -> dict[str, Callable]:
    """Methods of the interpreter by their names; `stock` holds those that they replace."""

    def cast(builder, source, dtype):
        source = _widened(source)
        if dtype.scalar == tl.bfloat16:
            return _rounded(source.data)
        return stock["cast_impl"](builder, source, dtype)

    def unary(builder, arg, op):
        if _is_bfloat16(arg):
            return _rounded(op(widened(arg.data)))
        return stock["unary_op"](builder, arg, op)

    def binary(builder, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            return stock["binary_op"](builder, lhs, rhs, op)
        result = op(widened(lhs.data), widened(rhs.data))
        if result.dtype == bool:  # of the other types a comparison keeps what was compared
            return TensorHandle(result, tl.int1)
        return _rounded(result)

    def ternary(builder, first, second, third, op):
        if op is np.where or not _is_bfloat16(third):  # a choice need not know what it chooses from
            return stock["ternary_op"](builder, first, second, third, op)
        return _rounded(op(*(widened(x.data) for x in (first, second, third))))

    def fma(builder, x, y, z):
        if not _is_bfloat16(z):
            return stock["create_fma"](builder, x, y, z)
        x, y, z = (widened(operand.data).astype(np.float64) for operand in (x, y, z))
        return _rounded(x * y + z)

    def constant(builder, value):  # Triton up to 3.7 makes none
        return _rounded(np.array([value], np.float32))

    def dot(builder, lhs, rhs, *rest):
        return stock["create_dot"](builder, _widened(lhs), _widened(rhs), *rest)

    def check_tensor(operation, operands):
        if any(operand.dtype == tl.bfloat16 for operand in operands):
            raise AssertionError(
                f"{type(operation).__name__} of bfloat16: how it is rounded depends on a GPU's "
                "layout; expected float32, as of x.to(tl.float32)"
            )
        stock["check_tensor"](operation, operands)

    return {
        "cast_impl": cast,
        "unary_op": unary,
        "binary_op": binary,
        "ternary_op": ternary,
        "create_fma": fma,
        "create_dot": dot,
        "get_bf16": constant,
        "check_tensor": check_tensor,
    }


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16; NaN stays NaN, and from 3.396e38 on it is inf."""
    if values.dtype not in (np.float16, np.float32):
        values = _cut_off(values.astype(np.float64))
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)


def _cut_off(values: np.ndarray) -> np.ndarray:
    """fp64 as fp32 whose last bit says that something was lost: a second rounding sees no tie."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32).copy()
    bits -= np.abs(nearest) > np.abs(values)
    bits |= nearest != values
    return bits.view(np.float32)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _rounded(values: np.ndarray) -> TensorHandle:
    return TensorHandle(rounded(values), tl.bfloat16)
