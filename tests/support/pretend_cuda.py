"""A CUDA device for tests without one: it computes on the CPU, and refuses what would wait for it.

Inside `pretend_cuda()` tensors of device "cuda" can be made. They hold their numbers on the CPU,
but what makes the host wait for a GPU raises `HostWaits`:

- reading a value (`.item()`, `if x`, `torch.equal`) and shapes that depend on values (`nonzero`,
  `unique_consecutive`, an index by a mask),
- copies to the CPU, and copies from it that are not from pinned memory or not `non_blocking`
  (`new_tensor`),
- a CPU tensor beside a CUDA tensor: an index is copied, anything else refused.

What the device would be told to do is counted (`Launches`). With `memory=False` its tensors have
shapes and no numbers, so that calls of any size can be counted.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_)
UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)
UNWRITTEN += (aten.detach, aten._unsafe_view, aten._reshape_alias)


class HostWaits(AssertionError):
    """The host would wait for the device."""


class OnDevice(Tensor):
    """Says that it is on a GPU; its `numbers` are on the CPU."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        # To torch's C++ it is on "meta": of a CUDA tensor autograd would want to know the stream.
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __repr__(self) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.new_tensor:  # on "meta" it copies nothing, and no operator is called
            raise HostWaits("new_tensor: a copy that is not pinned")
        with torch._C.DisableTorchFunctionSubclass():  # a copy on the CPU is none of this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of pretend_cuda()")


class Launches(NamedTuple):
    """What was launched, by name: one each for a matrix product, another ATen operator, a copy from
    the host and a Triton kernel; nothing for a view, or for memory that is not written.
    """

    triton: Counter[str]
    products: Counter[str]
    others: Counter[str]

    @property
    def total(self) -> int:
        return sum(kind.total() for kind in self)


class _Device(TorchDispatchMode):
    def __init__(self, may_wait: bool, memory: bool):
        super().__init__()
        self.may_wait, self.place = may_wait, CPU if memory else META
        self.launches = Launches(Counter(), Counter(), Counter())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, OnDevice)]
        wanted = kwargs.get("device") and torch.device(kwargs["device"])
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if not there and (wanted is None or wanted.type == "cpu"):
            return func(*args, **kwargs)
        if not self.may_wait:
            _refuse_to_wait(func, args, kwargs, tensors)
        self._count(func)
        if wanted is not None:  # "meta" where torch's C++ asks for a tensor beside another
            kwargs["device"] = CPU if wanted.type == "cpu" else self.place
        kwargs.pop("pin_memory", None)
        wrappers = {id(x.numbers): x for x in there}
        given = tree_map_only(OnDevice, lambda x: x.numbers, (args, kwargs))
        out = _compute(func, *given)
        if wanted is not None and wanted.type == "cpu":
            return out

        def wrapped(x: Tensor) -> Tensor:  # what was changed in place stays what it was
            return wrappers[id(x)] if id(x) in wrappers else OnDevice(x)

        return tree_map_only(Tensor, wrapped, out)

    def _count(self, func) -> None:
        if func.overloadpacket in PRODUCTS:
            self.launches.products[str(func)] += 1
        elif func.overloadpacket not in UNWRITTEN and not _is_view(func):
            self.launches.others[str(func)] += 1


def _is_view(func) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _refuse_to_wait(func, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    here = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    if func in (aten._to_copy.default, aten.copy_.default):
        source, free = args[-1 if func is aten._to_copy.default else 1], kwargs.get("non_blocking")
        if isinstance(source, OnDevice):
            to_cpu = str(kwargs.get("device")) == "cpu" or not isinstance(args[0], OnDevice)
            if to_cpu:
                raise HostWaits(f"{func}: a copy of {list(source.shape)} to the CPU")
        elif not (free and getattr(source, "is_pinned_here", False)):
            raise HostWaits(f"{func}: {list(source.shape)}, not pinned or not non_blocking")
        return
    if here and len(here) < len(tensors):
        raise HostWaits(f"{func}: {list(here[0].shape)} on the CPU beside a CUDA tensor")
    if func in INDEXED:
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            raise HostWaits(f"{func}: the length of an index by a mask")
    elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        raise HostWaits(f"{func}: its result depends on numbers on the device")


def _compute(func, args: tuple, kwargs: dict):
    """On the CPU, which lacks the matrix products from 16 to 32 bits."""
    if func in (aten.mm.dtype, aten.mm.dtype_out):
        a, b, dtype = args
        product = a.to(dtype) @ b.to(dtype)
        return kwargs["out"].copy_(product) if "out" in kwargs else product
    if func is aten.addmm.dtype_out:
        x, a, b, dtype = args
        return kwargs["out"].copy_(x + a.to(dtype) @ b.to(dtype))
    return func(*args, **kwargs)


@contextlib.contextmanager
def pretend_cuda(may_wait: bool = False, memory: bool = True) -> Iterator[Launches]:
    """Makes the device. Triton's kernels run in the interpreter, on numbers if there are any."""
    device = _Device(may_wait, memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with contextlib.suppress(ImportError):
            from kepo_kernels.rows import triton_rows

            start = triton_rows._start

            def start_on_cpu(kernel, grid, device_of_kernel, *arguments, **constants):
                device.launches.triton[kernel.fn.__name__] += 1
                if not memory:
                    return
                arguments = tree_map_only(OnDevice, lambda x: x.numbers, arguments)
                with _disable_current_modes():
                    start(kernel, grid, CPU, *arguments, **constants)

            patch.setattr(triton_rows, "_start", start_on_cpu)
        with device:
            yield device.launches


def on_device(x: Tensor) -> Tensor:
    """The numbers of `x`, copied to the device."""
    return OnDevice(x.detach().clone())


def numbers(x: Tensor) -> Tensor:
    """What is on the device, for the test to look at."""
    return x.detach().numbers
