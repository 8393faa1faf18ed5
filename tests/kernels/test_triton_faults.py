"""Can a fault in the Triton kernels hide from their tests? Faults planted in their text.

The kernels' own source is copied, changed in one place, imported as fresh modules and put through
the comparison with the fp64 oracle that every back-end passes. FAULTS is all that knows the text.
"""

import ast
import contextlib
import importlib
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import interpret
import pytest
import torch
from checks import (
    RowProblem,
    assert_rows_right,
    make_row_problem,
    rows_module,
    run_rows,
    unavailable,
)
from row_calls import both_at

import kepo_kernels
from kepo_kernels.rows import RowSettings

if reason := unavailable("triton"):
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("not interpreted: the kernels run on a GPU", allow_module_level=True)


class Fault(NamedTuple):
    name: str
    within: str  # the function whose text is changed, wherever `old` stands in it
    old: str
    new: str


FORWARD, BACKWARD = "_forward_kernel", "_backward_kernel"
FAULTS = (
    Fault("a program too many", "_launch", "kernel[(rows,)]", "kernel[(rows + 1,)]"),
    Fault("a program too few", "_launch", "kernel[(rows,)]", "kernel[(rows - 1,)]"),
    Fault("int32 row offset, forward", FORWARD, ".to(tl.int64)", ""),
    Fault("int32 row offset, backward", BACKWARD, ".to(tl.int64)", ""),
    Fault("no column mask on load", "read", ', mask=column < end, other=-float("inf")', ""),
    Fault("a column too many on load", "read", "column < end", "column <= end"),
    Fault("phantom columns", "read", 'other=-float("inf")', "other=0.0"),
    Fault("masked lanes left undefined", "read", ', other=-float("inf")', ""),
    Fault("no column mask on store, shared", BACKWARD, ", mask=column < shared", ""),
    Fault("no column mask on store, rest", BACKWARD, ", mask=column < vocab", ""),
    Fault("a column too many on store", BACKWARD, "mask=column < vocab", "mask=column <= vocab"),
    Fault("overlapping store, forward", FORWARD, "table += row", "table += row // 2"),
    Fault("overlapping store, backward", BACKWARD, "logits += row *", "logits += row // 2 *"),
    Fault("statistics of the next row", BACKWARD, "table += row", "table += row + 1"),
    Fault("loop a block short, softmax", "scan", "end, BLOCK):", "end - BLOCK, BLOCK):"),
    Fault("loop a block short, KL", FORWARD, "shared, BLOCK):", "shared - BLOCK, BLOCK):"),
    Fault("loop a block short, shared", BACKWARD, "shared, BLOCK):", "shared - BLOCK, BLOCK):"),
    Fault("loop a block short, rest", BACKWARD, "vocab, BLOCK):", "vocab - BLOCK, BLOCK):"),
    Fault("no rescale of sums", "scan", "e * total + 1.0", "total + 1.0"),
    Fault("no rescale of moments", "scan", "weighted(e, moment - x * total)", "moment"),
    Fault("no rescale of lanes' sums", "reduce", "tl.sum(scale * total, 0)", "tl.sum(total, 0)"),
    Fault("no rescale of lanes' moments", "reduce", "weighted(scale, moment", "(moment"),
)


@contextlib.contextmanager
def mutated(old: str, new: str, within: str = "") -> Iterator[ModuleType]:
    """`triton_rows` of a copy of kepo_kernels' Triton modules with `old` replaced by `new`.

    Only in functions called `within`, if it is given. Text that is not there is an error.
    """
    sources = sorted(Path(kepo_kernels.__file__).parent.glob("triton_*.py"))
    texts = {path.name: path.read_text() for path in sources}
    changed = {name: _replaced(text, old, new, within) for name, text in texts.items()}
    if changed == texts:
        where = f"in {within} of" if within else "in"
        raise LookupError(f"nothing to plant: {old!r} does not occur {where} {', '.join(texts)}")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        package = Path(folder, "mutant")
        package.mkdir()
        for name, text in changed.items():
            (package / name).write_text(text.replace("kepo_kernels.triton_", "mutant.triton_"))
        patch.syspath_prepend(folder)
        try:
            yield importlib.import_module("mutant.triton_rows")
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "mutant"]:
                del sys.modules[name]


def _replaced(text: str, old: str, new: str, within: str) -> str:
    if not within:
        return text.replace(old, new)
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name == within:
            body = slice(node.lineno - 1, node.end_lineno)
            lines[body] = ["".join(lines[body]).replace(old, new)]
    return "".join(lines)


class Case(NamedTuple):
    name: str
    problem: RowProblem
    settings: RowSettings
    far_apart: bool = False


def cases() -> list[Case]:
    """The smallest problems that together run every loop of the kernels more than once."""
    return [
        Case("one block", make_row_problem(3, 37, 37), both_at(0.5, 0.7)),
        Case("wider student", make_row_problem(2, 70, 37), both_at(0.0, 0.7)),
        Case("several blocks", make_row_problem(2, 4099, 4099), both_at(0.5)),
        Case("bfloat16", make_row_problem(2, 70, 37, dtype=torch.bfloat16), both_at(1.0)),
        Case("no teacher", make_row_problem(2, 4099), both_at(0.5)),
        Case("far apart", make_row_problem(3, 37, 37), both_at(0.5), far_apart=True),
    ]


def with_rows_far_apart(rows: ModuleType, folder: Path) -> SimpleNamespace:
    """`rows` on logits whose row 2 starts past 2^31 elements, in a file that is nearly all hole."""
    pitch = 2**30 + 64

    def spread(logits: torch.Tensor) -> torch.Tensor:
        n, vocab = logits.shape
        size = (n - 1) * pitch + vocab
        store = torch.from_file(str(folder / "rows"), shared=True, size=size, dtype=logits.dtype)
        return store.as_strided((n, vocab), (pitch, 1)).copy_(logits)

    def row_forward(logits, *rest):
        return rows.row_forward(spread(logits), *rest)

    def row_backward_(logits, *rest):
        far = spread(logits)
        rows.row_backward_(far, *rest)
        logits.copy_(far)

    return SimpleNamespace(row_forward=row_forward, row_backward_=row_backward_)


def run_case(rows: ModuleType, case: Case, folder: Path) -> None:
    under_test = with_rows_far_apart(rows, folder) if case.far_apart else rows
    assert_rows_right(under_test, case.problem, case.settings)


def caught_by(fault: Fault, folder: Path) -> str | None:
    """The first case that notices, and how."""
    with mutated(fault.old, fault.new, fault.within) as rows:
        for case in cases():
            try:
                run_case(rows, case, folder)
            except AssertionError as error:  # any other kind: this is no kernel any more
                return f"{case.name}: {str(error).splitlines()[0]}"
    return None


def test_no_planted_fault_is_missed(tmp_path):
    found = {fault.name: caught_by(fault, tmp_path) for fault in FAULTS}
    print(f"\n{'planted fault':31} | caught by")
    for name, how in found.items():
        print(f"{name:31} | {textwrap.shorten(how or 'NOTHING', 110)}")
    assert [name for name, how in found.items() if how is None] == []
    assert len(found) == len(FAULTS)  # no name stands for two


def test_without_a_fault_all_orders_give_the_same_right_bits(tmp_path):
    rows = rows_module("triton")
    for case in cases():
        run_case(rows, case, tmp_path)
        results = []
        for order in interpret.ORDERS:
            with interpret.checked(order):
                results.append(run_rows(rows, case.problem, case.settings))
        for table, gradient in results[1:]:
            assert torch.equal(table, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_fault_that_does_not_apply_is_an_error():
    with (
        pytest.raises(LookupError, match=r"'no such text' does not occur in read of .*triton_math"),
        mutated("no such text", "", "read"),
    ):
        pass
