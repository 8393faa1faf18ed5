"""The Triton interpreter, with the checks that it lacks.

The stock interpreter (Triton 3.4 to 3.9) executes kernels on the CPU, but it reads and writes
whatever address it is told to, runs the programs one after another, so that a race cannot show, and
cuts fp32 off to bf16 where a GPU rounds to nearest. Inside `checked()` it refuses addresses outside
of the tensors that were passed, and addresses that one program writes and another one uses; it
rounds as a GPU does; and it runs the grid backwards. What only a GPU can show stays unseen: shared
memory, layouts, registers, speed.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Runs interpreted kernels under the checks above; a violation raises, and says which it is."""
    import numpy as np
    from triton.runtime import interpreter

    Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, cast = Builder.create_masked_load, Builder.create_masked_store, Builder.cast_impl
    execute, set_grid_idx = Executor.__call__, Builder.set_grid_idx
    patch_language = interpreter._patch_lang
    tensors: list[Tensor] = []
    touched: list[tuple[int, bool, np.ndarray]] = []  # (program, is a store, addresses)
    patched: set[int] = set()
    program = 0

    def visit(kind: str, pointers, mask) -> None:
        # Copies: the kernel goes on to use these arrays.
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        outside = ~np.logical_or.reduce([_inside(addresses, tensor) for tensor in tensors])
        if outside.any():
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise AssertionError(
                f"program {program}: {outside.sum()} lanes of a {kind} lie outside of {shapes}"
            )
        touched.append((program, kind == "store", np.unique(addresses)))

    def checked_load(self, pointers, mask, *rest):
        visit("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        visit("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def rounding_cast(self, source, dtype):
        result = cast(self, source, dtype)
        names = (source.dtype.scalar.name, dtype.scalar.name)
        if names == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            result.data = rounded.view(torch.int16).numpy().view(np.uint16)
        return result

    def backwards(self, x, y, z):
        nonlocal program
        program = self.grid_dim[0] - 1 - x
        set_grid_idx(self, program, y, z)

    def checked_execute(self, *args, **kwargs):
        tensors[:] = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        touched.clear()
        patched.clear()
        with np.errstate(all="ignore"):  # a GPU does not warn of inf - inf either
            execute(self, *args, **kwargs)
        _refuse_races(touched)

    def patch_language_once(function):
        # Done anew at each call of a helper by a kernel, this takes half of the time.
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch_language(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_language_once)
        patch.setattr(Builder, "create_masked_load", checked_load)
        patch.setattr(Builder, "create_masked_store", checked_store)
        patch.setattr(Builder, "cast_impl", rounding_cast)
        patch.setattr(Builder, "set_grid_idx", backwards)
        patch.setattr(Executor, "__call__", checked_execute)
        # CPU tensors are used where they are: copied onto themselves, a sparse file would fill up.
        patch.setattr(Executor, "_restore_args_dev", lambda *_: None)
        yield


def _inside(addresses, tensor: Tensor):
    """Which addresses are elements of a 1-d tensor, or of a 2-d one with contiguous rows."""
    offset, misaligned = divmod(addresses - tensor.data_ptr(), tensor.element_size())
    rows, width = (1, *tensor.shape)[-2:]
    pitch = tensor.stride(0) if rows > 1 else 0
    row, column = divmod(offset, pitch or max(1, width))
    return (misaligned == 0) & (row >= 0) & (row < rows) & (column < width)


def _refuse_races(touched) -> None:
    """No address that is stored to may be touched by two programs."""
    import numpy as np

    if not touched:
        return
    by_program = [
        np.unique(np.concatenate([a for owner, _, a in touched if owner == program]))
        for program in {owner for owner, _, _ in touched}
    ]
    addresses, programs = np.unique(np.concatenate(by_program), return_counts=True)
    stored = np.concatenate([a for _, is_store, a in touched if is_store] or [addresses[:0]])
    raced = np.isin(addresses[programs > 1], stored).sum()
    if raced:
        raise AssertionError(
            f"race: {raced} addresses are written by one program and used by another"
        )
