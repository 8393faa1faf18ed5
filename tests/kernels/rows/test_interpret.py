"""The checks of tests/interpret.py, each on a tiny kernel, and what the stock interpreter does.

Every test that names a fault runs it twice: `checked()`, where it must show, and `unchecked()`,
where it must not, so that a check which Triton comes to have itself is noticed.
"""

import contextlib
import inspect
import re

import pytest
import torch
from checks import unavailable
from interpret import ORDERS, checked, unchecked

if reason := unavailable("triton"):
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("not interpreted: the kernels run on a GPU", allow_module_level=True)

from kepo_kernels.rows.triton_math import jit, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@contextlib.contextmanager
def caught(*words: str):
    """The block raises under the checks, and its message holds the words."""
    with pytest.raises(AssertionError, match=".*".join(re.escape(word) for word in words)):
        yield


@jit
def index(out, a, b, OPERATION: tl.constexpr):
    lanes = tl.arange(0, 2)
    if OPERATION == "add":
        result = a + (b + lanes)
    elif OPERATION == "sub":
        result = a - (b + lanes)
    elif OPERATION == "mul":
        result = a * (b + lanes)
    elif OPERATION == "wide":
        result = a.to(tl.int64) * (b + lanes)
    elif OPERATION == "unsigned":
        result = a.to(tl.uint32) + (b + lanes).to(tl.uint32) + 2147483648
    elif OPERATION == "meant":
        result = tl.add(a, b + lanes, sanitize_overflow=False)
    else:
        result = tl.program_id(1) * a + lanes
    tl.store(out + lanes, result)


OVERFLOWS = [
    ("add", 2**31 - 2, 1, (1,), ("(0, 0, 0): 1 lanes of add overflow int32", "is 2147483648")),
    ("sub", -(2**31) + 1, 1, (1,), ("1 lanes of sub", "is -2147483649")),
    ("mul", 14134, 151937, (1,), ("1 lanes of mul", "is 2147491692")),
    ("mul", -(2**16), 2**15, (1,), ("1 lanes of mul", "is -2147549184")),
    ("program", 2**30, 0, (1, 3), ("(0, 2, 0): 1 lanes of mul", "is 2147483648")),
]


@pytest.mark.parametrize(("operation", "a", "b", "grid", "words"), OVERFLOWS)
def test_int32_overflow_is_caught(operation, a, b, grid, words):
    out = torch.zeros(2, dtype=torch.int64)
    with caught("index, program", *words):
        index[grid](out, a, b, operation)
    with unchecked():  # two's complement, as on a GPU
        index[grid](out, a, b, operation)
    assert not out.any() or out.prod() < 0 or operation == "program"


@pytest.mark.parametrize(
    ("operation", "expected"), [("wide", 2**32 - 2), ("unsigned", 1), ("meant", 1 - 2**31)]
)
def test_what_does_not_overflow_or_says_that_it_may(operation, expected):
    out = torch.zeros(2, dtype=torch.int64)
    index[(1,)](out, 2**31 - 1, 2, operation)
    assert out[0] == expected


def test_the_last_int32_is_no_overflow():
    out = torch.zeros(2, dtype=torch.int64)
    index[(1,)](out, 2**31 - 3, 1, "add")
    index[(1,)](out, -(2**31) + 2, 1, "sub")
    assert out.tolist() == [1 - 2**31, -(2**31)]


@jit
def note_order(counter, out):
    y, z = tl.num_programs(1), tl.num_programs(2)
    program = (tl.program_id(0) * y + tl.program_id(1)) * z + tl.program_id(2)
    tl.store(out + program, tl.atomic_add(counter, 1))


def places(*grid: int) -> list[int]:
    """When each program ran, x slowest and z fastest."""
    out = torch.zeros(grid, dtype=torch.int32).flatten()
    note_order[grid](torch.zeros(1, dtype=torch.int32), out)
    return out.tolist()


@pytest.mark.parametrize("grid", [(6,), (2, 3), (2, 3, 4)], ids=str)
def test_orders(grid):
    n = torch.Size(grid).numel()
    assert places(*grid) == list(range(n))[::-1]  # what tests get that do not ask
    with checked(order="forwards"):
        assert places(*grid) == list(range(n))
    with checked(order="shuffled", seed=1):
        first, second = places(*grid), places(*grid)
    assert sorted(first) == sorted(second) == list(range(n))
    assert len({tuple(x) for x in (first, second, range(n), range(n)[::-1])}) == 4
    with checked(order="shuffled", seed=1):
        assert (first, second) == (places(*grid), places(*grid))
    with unchecked():
        assert places(*grid) == list(range(n))


def test_an_unknown_order_is_refused():
    with (
        pytest.raises(ValueError, match="'sideways', expected one of backwards, forwards, shuff"),
        checked(order="sideways"),
    ):
        pass


@jit
def share(x, out, AXIS: tl.constexpr, HOW: tl.constexpr):
    program = tl.program_id(AXIS)
    if HOW == "both write":
        tl.store(out, program)
    elif HOW == "one reads":
        if program == 0:
            tl.store(out, 7)
        else:
            tl.store(out + program, tl.load(out))
    elif HOW == "one is atomic":
        if program == 0:
            tl.store(out, 7)
        else:
            tl.atomic_add(out, 1)
    elif HOW == "both are atomic":
        tl.atomic_add(out, 1)
    else:
        tl.store(out + program, tl.load(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("both write", {"store"}),
        ("one reads", {"store", "load"}),
        ("one is atomic", {"store", "atomic"}),
    ],
)
def test_races_are_caught(how, kinds, axis, order):
    grid = [1, 1, 1]
    grid[axis] = 2
    other = tuple(n - 1 for n in grid)
    x, out = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with checked(order), pytest.raises(AssertionError, match="race: 1 addresses of share") as error:
        share[tuple(grid)](x, out, axis, how)
    text = str(error.value)
    assert "out[0]" in text and "program (0, 0, 0)" in text and f"program {other}" in text
    assert set(re.findall("store|load|atomic", text.partition("out[0]:")[2])) == kinds
    with unchecked():
        share[tuple(grid)](x, out, axis, how)
    assert out.any()


@pytest.mark.parametrize("how", ["both are atomic", "both read"])
def test_what_programs_may_share(how):
    share[(4,)](torch.ones(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 0, how)


@jit
def scatter(out, values, places, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(out + tl.load(places + lanes), tl.load(values + lanes))


def test_lanes_of_one_store_must_agree():
    out, places = torch.zeros(2, 8), torch.tensor([3, 15, 3, 15])
    same = torch.tensor([1.0, torch.nan, 1.0, torch.nan])
    scatter[(1,)](out, same, places, 4)
    assert out[0, 3] == 1 and out[1, 7].isnan()
    different = torch.tensor([1.0, 2.0, 1.0, 4.0])
    with caught("scatter, program (0, 0, 0): lanes of one store", "to 1 addresses", "out[1, 7]"):
        scatter[(1,)](out, different, places, 4)
    with unchecked():
        scatter[(1,)](out, different, places, 4)


@jit
def walk(x, out, offset, HOW: tl.constexpr):
    place = x + offset + tl.arange(0, 4)
    if HOW == "store":
        tl.store(place, 7)
    elif HOW == "atomic_add":
        tl.atomic_add(place, 7)
    elif HOW == "atomic_cas":
        tl.atomic_cas(place, tl.zeros((4,), tl.int32), tl.full((4,), 7, tl.int32))
    elif HOW == "load from integers":
        place = (x.to(tl.int64) + offset).to(tl.pointer_type(tl.int32)) + tl.arange(0, 4)
        tl.store(out + tl.arange(0, 4), tl.load(place))
    else:
        tl.store(out + tl.arange(0, 4), tl.load(place))


@pytest.mark.parametrize("how", ["load", "store", "atomic_add", "atomic_cas"])
@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (-1, ("1 lanes of", "outside of x (3, 4); the first lies 4 bytes before x")),
        (13, ("1 lanes of", "outside of x (3, 4); the first lies 0 bytes after x")),
        (2, ("2 lanes of", "outside of x (3, 4); the first lies between elements of x")),
        (16, ("4 lanes of", "outside of x (3, 4); the first lies 0 bytes after x")),  # in `out`
    ],
)
def test_addresses_outside_are_caught(offset, words, how):
    """Where the stock interpreter finds other numbers, or overwrites them."""
    buffer = torch.zeros(40, dtype=torch.int32)
    x, out = buffer[4:].as_strided((3, 4), (6, 1)), buffer[20:24]
    with caught("walk, program (0, 0, 0): ", *words):
        walk[(1,)](x, out, offset, how)
    with unchecked():
        walk[(1,)](x, out, offset, how)
    assert (how == "load") != (7 in buffer)


def test_pointers_made_of_integers():
    """Such a pointer may go to all tensors, but only to whole elements."""
    buffer, out = torch.arange(8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    walk[(1,)](buffer[:4], out, out.data_ptr() - buffer.data_ptr(), "load from integers")
    walk[(1,)](buffer, out, 16, "load from integers")
    assert out.tolist() == [4, 5, 6, 7]
    with caught("4 lanes of a load", "between elements of x"):
        walk[(1,)](buffer, out, 5, "load from integers")


def test_elements_of_any_strides_are_inside():
    buffer, out = torch.arange(64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for view, offset in [
        (buffer.view(2, 4, 8)[:, 1:3, 2:6], 32 + 8),
        (buffer.view(8, 8).T[4:, :5], 8),
        (buffer.view(8, 8)[1].expand(3, 8), 4),
        (buffer.as_strided((5, 4), (1, 1)), 4),
        (buffer[:4], 0),
    ]:
        walk[(1,)](view, out, offset, "load")
        assert out[0] == view.storage_offset() + offset


@jit
def load_some(x, out, OTHER: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    if OTHER:
        value = tl.load(x + lanes, mask=lanes < LANES - 2, other=1)
    else:
        value = tl.load(x + lanes, mask=lanes < LANES - 2)
    tl.store(out + lanes, value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_lanes_without_other_are_nan(dtype):
    x, out = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    load_some[(1,)](x, out, False, 4)
    assert out.isnan().tolist() == [False, False, True, True]
    with unchecked():
        load_some[(1,)](x, out, False, 4)
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_masked_lanes_without_other_are_odd(dtype):
    x, out = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    load_some[(1,)](x, out, False, 4)
    assert not out[:2].any()
    assert (out[2:] > torch.iinfo(dtype).max // 2).all() and (out[2:] % 2 == 1).all()
    load_some[(1,)](x, out, True, 4)
    assert out.tolist() == [0, 0, 1, 1]


@jit
def require(x, BOUND: tl.constexpr, ALL: tl.constexpr):
    lanes = tl.arange(0, 4)
    if ALL:
        tl.device_assert(tl.load(x + lanes) < BOUND, "too large")
    else:
        tl.device_assert(tl.load(x + lanes) < BOUND, "too large", mask=lanes < 2)


def test_device_assert():
    x = torch.arange(8)
    require[(1,)](x, 4, True)
    if "mask" in inspect.signature(tl.device_assert).parameters:  # Triton 3.4 has none
        require[(1,)](x, 2, False)
    with caught("require, program (1, 0, 0): device_assert fails in 2 of 4 lanes: too large"):
        require[(2,)](x, 2, True)
    with unchecked():
        require[(2,)](x, 2, True)
