"""The memory that one launch of an interpreted kernel touches: addresses, races, what is undefined.

A pointer may go anywhere in the tensor that it was passed as or computed from, and nowhere else;
what lies between the rows of a strided view is outside of it. A race is an address that two
programs use, unless both read it or both do so atomically. Not seen are races within one program:
a GPU orders the accesses of its threads only at a barrier, the interpreter always.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

Program = tuple[int, int, int]
LOAD, STORE, ATOMIC = range(3)
KINDS = ("load", "store", "atomic operation")


class Region(NamedTuple):
    """The elements of a tensor that was passed to the kernel."""

    name: str
    tensor: Tensor
    start: int  # addresses of the first byte and of the one after the last
    end: int
    steps: tuple[tuple[int, int], ...]  # (size, stride) from far to near, () if there are no gaps


class Access(NamedTuple):
    program: int  # its index in Launch.programs
    kind: int
    addresses: np.ndarray


@dataclass
class Launch:
    kernel: str
    regions: list[Region]
    programs: list[Program] = field(default_factory=list)  # those begun so far, in this order
    accesses: list[Access] = field(default_factory=list)

    def here(self) -> str:
        return f"{self.kernel}, program {self.programs[-1]}"


def launched(kernel: str, arguments: dict[str, object]) -> Launch:
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.numel()}
    return Launch(kernel, [_region(name, x) for name, x in tensors.items()])


def _region(name: str, tensor: Tensor) -> Region:
    steps = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    steps = sorted(((n, step) for n, step in steps if step > 0), key=lambda pair: -pair[1])
    elements = 1 + sum((n - 1) * step for n, step in steps)
    end = tensor.data_ptr() + elements * tensor.element_size()
    gaps = elements != np.prod([n for n, _ in steps], dtype=np.int64)
    return Region(name, tensor, tensor.data_ptr(), end, tuple(steps) if gaps else ())


def visit(launch: Launch, kind: int, pointers: TensorHandle, mask: np.ndarray) -> np.ndarray:
    """The addresses that the lanes of one operation use; raises if one is not the pointer's own."""
    addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)].view(np.int64)
    regions, start = launch.regions, getattr(pointers.dtype, "tensor_start", None)
    if start is not None:  # else it was made of an integer, and may point to any of them
        regions = [region for region in regions if region.start == start]
    outside = np.ones(addresses.shape, bool)
    for region in regions:
        outside &= ~_inside(region, addresses)
    if outside.any():
        shapes = ", ".join(f"{x.name} {tuple(x.tensor.shape)}" for x in regions)
        raise AssertionError(
            f"{launch.here()}: {outside.sum()} lanes of a {KINDS[kind]} lie outside of "
            f"{shapes or 'any tensor'}; {_whereabouts(regions, int(addresses[outside][0]))}"
        )
    launch.accesses.append(Access(len(launch.programs) - 1, kind, addresses))
    return addresses


def _inside(region: Region, addresses: np.ndarray) -> np.ndarray:
    width = region.tensor.element_size()
    inside = (addresses >= region.start) & (addresses < region.end)
    offset = addresses - region.start
    if width > 1:
        inside &= offset % width == 0
    if region.steps and inside.any():
        offset //= width
        for size, stride in region.steps:
            offset -= stride * np.minimum(offset // stride, size - 1)
        inside &= offset == 0
    return inside


def _whereabouts(regions: list[Region], address: int) -> str:
    """Where an address that lies in no tensor lies."""

    def distance(region: Region) -> int:
        return max(region.start - address, address - region.end + 1, 0)

    if not regions:
        return f"the first is {address:#x}"
    region = min(regions, key=distance)
    if address < region.start:
        return f"the first lies {region.start - address} bytes before {region.name}"
    if address >= region.end:
        return f"the first lies {address - region.end} bytes after {region.name}"
    return f"the first lies between elements of {region.name}"


def refuse_ambiguous_store(launch: Launch, addresses: np.ndarray, values: np.ndarray) -> None:
    """Lanes of one store that share an address must agree on what to write."""
    if (addresses[1:] > addresses[:-1]).all():
        return
    order = np.argsort(addresses, kind="stable")
    addresses, values = addresses[order], np.ascontiguousarray(values[order])
    bits = values.view(f"u{values.itemsize}")  # so that a NaN is itself
    clash = (addresses[1:] == addresses[:-1]) & (bits[1:] != bits[:-1])
    if clash.any():
        clashing = np.unique(addresses[1:][clash])
        raise AssertionError(
            f"{launch.here()}: lanes of one store write different values to {len(clashing)} "
            f"addresses; the first is {_element(launch, int(clashing[0]))}"
        )


def refuse_races(launch: Launch) -> None:
    """No address may be used by two programs, unless both read it or both use it atomically."""
    if len(launch.programs) < 2 or all(kind == LOAD for _, kind, _ in launch.accesses):
        return
    addresses = np.concatenate([access.addresses for access in launch.accesses])
    lengths = [len(access.addresses) for access in launch.accesses]
    programs = np.repeat([access.program for access in launch.accesses], lengths)
    kinds = np.repeat([access.kind for access in launch.accesses], lengths)

    order = np.argsort(addresses, kind="stable")
    addresses, programs, kinds = addresses[order], programs[order], kinds[order]
    begins = np.flatnonzero(np.diff(addresses, prepend=-1))

    def lowest_and_highest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.minimum.reduceat(x, begins), np.maximum.reduceat(x, begins)

    (first, last), (low, high) = lowest_and_highest(programs), lowest_and_highest(kinds)
    raced = np.flatnonzero((first != last) & ((low != high) | (low == STORE)))
    if not raced.size:
        return
    address = int(addresses[begins[raced[0]]])
    uses = sorted({(kind, number) for number, kind, at in launch.accesses if address in at})
    kind, number = uses[-1]  # not a load
    other_kind, other = next(use for use in reversed(uses) if use[1] != number)
    raise AssertionError(
        f"race: {raced.size} addresses of {launch.kernel} are written by one program and used by "
        f"another; the first is {_element(launch, address)}: {KINDS[kind]} of program "
        f"{launch.programs[number]}, {KINDS[other_kind]} of program {launch.programs[other]}"
    )


def _element(launch: Launch, address: int) -> str:
    """The name of a tensor that holds the address, and the index in it."""
    region = next(x for x in launch.regions if _inside(x, np.array([address])).all())
    tensor, index = region.tensor, [0] * region.tensor.ndim
    offset = (address - region.start) // tensor.element_size()
    for axis in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
        if stride := tensor.stride(axis):
            index[axis] = min(offset // stride, tensor.shape[axis] - 1)
            offset -= index[axis] * stride
    return f"{region.name}{index}"


def undefined(shape: tuple[int, ...], dtype: np.dtype, floating: bool) -> np.ndarray:
    """What masked lanes of a load hold that was given no `other`: NaN, or 0x55 in every byte."""
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    if floating:  # bf16 and fp8, which are bit patterns here
        return np.full(shape, {1: 0x7F, 2: 0x7FC0}[dtype.itemsize], dtype)
    return np.full(shape, np.frombuffer(b"\x55" * dtype.itemsize, dtype)[0])
