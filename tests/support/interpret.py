"""The Triton interpreter, with the checks that it lacks.

The stock interpreter (Triton 3.4 to 3.9) executes kernels on the CPU, but it reads and writes
whatever address it is told to, runs the programs one after another in the order of the grid, so
that a race cannot show, lets int32 wrap around, skips `tl.device_assert`, reads 0 where a mask
hides the address and no `other` is given, and knows of bf16 only the bits. Inside `checked()`

- addresses outside of the tensor that a pointer belongs to and races are refused, as are two lanes
  of one store that write different values to one address (interpret_memory.py),
- so are sums, differences and products of int32 that leave it,
- bf16 computes and is rounded as on a GPU (interpret_bfloat16.py), and of NaN and a number the
  minimum is the number, as on a GPU and not in Triton up to 3.7,
- `tl.device_assert` asserts, and what a GPU leaves undefined is NaN or a large odd integer,
- the programs run in the order asked for, by default from the last to the first.

What only a GPU can show stays unseen: shared memory, layouts, registers, speed, races within one
program. So does the overflow of Python's integers: here a loop's index is one of them.
"""

import contextlib
import copy
import dataclasses
import functools
import operator
import random
from collections.abc import Callable, Iterator

import pytest

ORDERS = ("backwards", "forwards", "shuffled")


@contextlib.contextmanager
def checked(order: str = "backwards", seed: int = 0) -> Iterator[None]:
    """Runs interpreted kernels under the checks above; a violation raises, and says which it is.

    "shuffled" draws an order for each launch, the same ones for the same seed. `checked` within
    `checked` replaces the outer one.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
    import interpret_bfloat16
    import interpret_memory as memory
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    stock = _stock()
    launch = memory.launched("no kernel", {})
    ahead: Iterator[memory.Program] = iter(())  # the programs of this launch that are to run
    patched: set[int] = set()
    generator = random.Random(seed)

    def load(builder, pointers, mask, other, *rest):
        memory.visit(launch, memory.LOAD, pointers, mask.data)
        if other is None and not mask.data.all():
            dtype = pointers.get_element_ty()
            other = memory.undefined(
                pointers.data.shape, interpreter._get_np_dtype(dtype), dtype.is_floating()
            )
            other = interpreter.TensorHandle(other, dtype)
        return stock["create_masked_load"](builder, pointers, mask, other, *rest)

    def store(builder, pointers, value, mask, *rest):
        addresses = memory.visit(launch, memory.STORE, pointers, mask.data)
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        values = np.broadcast_to(value.data, pointers.data.shape)[lanes]
        memory.refuse_ambiguous_store(launch, addresses, values)
        return stock["create_masked_store"](builder, pointers, value, mask, *rest)

    def atomic_rmw(builder, operation, pointers, value, mask, *rest):
        memory.visit(launch, memory.ATOMIC, pointers, mask.data)
        return stock["create_atomic_rmw"](builder, operation, pointers, value, mask, *rest)

    def atomic_cas(builder, pointers, *rest):
        memory.visit(launch, memory.ATOMIC, pointers, np.array(True))
        return stock["create_atomic_cas"](builder, pointers, *rest)

    def convert(argument):
        value = stock["_implicit_cvt"](argument)
        if hasattr(argument, "data_ptr"):
            # Pointers that are computed from this one share its type, and so remember their tensor.
            value.handle.dtype = copy.copy(value.handle.dtype)
            value.handle.dtype.tensor_start = argument.data_ptr()
        return value

    def refuse_overflow(_, lhs, rhs, operation):
        lhs, rhs = lhs.handle.data, rhs.handle.data
        if lhs.dtype.kind != "i" or lhs.itemsize == 8:  # unsigned numbers are meant to wrap
            return
        compute = getattr(operator, operation.__name__)
        exact = np.asarray(compute(lhs.astype(np.int64), rhs.astype(np.int64)))
        limits = np.iinfo(lhs.dtype)
        outside = (exact < limits.min) | (exact > limits.max)
        if outside.any():
            raise AssertionError(
                f"{launch.here()}: {outside.sum()} lanes of {operation.__name__} overflow "
                f"{lhs.dtype}; the first is {exact[outside][0]}"
            )

    def device_assert(_, condition, message):
        if not condition.data.all():
            failed = np.count_nonzero(~condition.data)
            raise AssertionError(
                f"{launch.here()}: device_assert fails in {failed} of {condition.data.size} "
                f"lanes: {message}"
            )

    def clamp(builder, x, low, high, propagate_nan):
        if propagate_nan != tl.PropagateNan.NONE:
            return stock["create_clampf"](builder, x, low, high, propagate_nan)
        return builder.create_minnumf(builder.create_maxnumf(x, low), high)

    def set_grid_dim(builder, *grid):
        nonlocal ahead
        stock["set_grid_dim"](builder, *grid)
        programs = list(np.ndindex(*grid))
        if order == "backwards":
            programs.reverse()
        elif order == "shuffled":
            generator.shuffle(programs)
        ahead = iter(programs)

    def set_grid_idx(builder, *_):
        launch.programs.append(next(ahead))
        stock["set_grid_idx"](builder, *launch.programs[-1])

    def execute(executor, *args, **kwargs):
        nonlocal launch
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        launch = memory.launched(executor.fn.__name__, named)
        patched.clear()
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn of inf - inf either
                stock["__call__"](executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise _cause(error) from None  # not as the text of a text
        memory.refuse_races(launch)

    def patch_language(function):
        # Done anew at each call of a helper by a kernel, this takes half of the time.
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return stock["_patch_lang"](function)

    def patch_tensor(tensor, *scope):
        # A number is an array of one element, and of those numpy has made no int since 2.4. Triton
        # up to 3.6 asks it to, for `range(begin, ...)`.
        stock["_patch_lang_tensor"](tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda number: number.handle.data.item())

    replacements = {
        "_implicit_cvt": convert,
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "binary_op_sanitize_overflow_impl": refuse_overflow,
        "create_assert": device_assert,
        "create_minnumf": lambda builder, x, y: builder.binary_op(x, y, np.fmin),
        "create_maxnumf": lambda builder, x, y: builder.binary_op(x, y, np.fmax),
        "create_clampf": clamp,
        # Without debug no device_assert gets as far as create_assert.
        "options": dataclasses.replace(stock["options"], debug=True),
        "set_grid_dim": set_grid_dim,
        "set_grid_idx": set_grid_idx,
        "__call__": execute,
        "_patch_lang": patch_language,
        "_patch_lang_tensor": patch_tensor,
        # CPU tensors are used where they are: copied onto themselves, a sparse file would fill up.
        "_restore_args_dev": lambda *_: None,
        **interpret_bfloat16.replacements(stock),
    }
    with _replaced(replacements):
        yield


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """The interpreter as Triton has it, also within `checked`."""
    with _replaced(_stock()):
        yield


@contextlib.contextmanager
def _replaced(replacements: dict[str, object]) -> Iterator[None]:
    owners = _owners()
    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in replacements.items():
            patch.setattr(owners[name], name, replacement, raising=False)
        yield


@functools.cache
def _owners() -> dict[str, object]:
    """What of the interpreter is replaced: the name, and the class or module that it belongs to."""
    from triton.runtime import interpreter

    names = {
        interpreter.InterpreterBuilder: "create_masked_load create_masked_store create_atomic_rmw "
        "create_atomic_cas create_assert set_grid_dim set_grid_idx cast_impl unary_op binary_op "
        "ternary_op create_fma create_dot create_minnumf create_maxnumf create_clampf get_bf16",
        interpreter.interpreter_builder: "options",
        type(interpreter.interpreter_semantic): "binary_op_sanitize_overflow_impl",
        interpreter.ReduceScanOpInterface: "check_tensor",
        interpreter.GridExecutor: "__call__ _restore_args_dev",
        interpreter: "_patch_lang _patch_lang_tensor _implicit_cvt",
    }
    return {name: owner for owner, listed in names.items() for name in listed.split()}


@functools.cache
def _stock() -> dict[str, Callable]:
    """What Triton has under these names; first called when nothing is replaced yet."""
    owners = _owners().items()
    return {name: getattr(owner, name) for name, owner in owners if hasattr(owner, name)}


def _cause(error: BaseException) -> BaseException:
    """The error in a kernel that the interpreter wrapped, once for each call of a helper."""
    from triton.runtime.interpreter import InterpreterError

    while isinstance(error, InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error
