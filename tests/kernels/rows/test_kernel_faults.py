"""Can the tests of the Triton kernels fail? Mistakes planted in the source, and what catches them.

Some are caught by the comparison with the oracle, some only by the interpreter's own checks: a
stock interpreter, and often a GPU, would let those pass.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import interpret
import pytest
import torch
from checks import assert_rows_right, make_row_problem, rows_module, unavailable
from row_calls import BackEnd, both_at
from test_certain_rows import assert_right_where_sure
from torch import Tensor

from kepo_kernels.rows import triton_kernels, triton_math

FAULTS = {  # what stands in the source, and what is planted in its place
    "no column mask on load": ("row + column, mask=column < end", "row + column, mask=column >= 0"),
    "no column mask on store": ("element_ty), mask=column < end", "element_ty), mask=column >= 0"),
    "phantom columns of logit 0": (
        'mask=column < end, other=-float("inf")',
        "mask=column < end, other=0.0",
    ),
    "sections of two rows in one place": (
        "parts += row * (3 * sections) + section",
        "parts += section",
    ),
    "gradients of two rows in one place": ("out += row * out_stride", "out += 0 * out_stride"),
    "row offset in 32 bits": ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    "last block left out": ("range(begin, end, BLOCK", "range(begin, end - BLOCK, BLOCK"),
    "sections not rescaled": ("tl.sum(kept * total, 0)", "tl.sum(total, 0)"),
    "blocks not rescaled": ("total = kept * total", "total = total"),
    "the peak's ratio not its own": ("tl.where(column == token, -mean_ratio, ratio)", "ratio"),
    "the peak looked for in the first section": ("tl.where(holds, lanes, SECTIONS)", "lanes"),
    "sections not masked when merged": ("present = lanes < count", "present = lanes < sections"),
    "tail takes part in the divergence": ("distils = begin < shared", "distils = begin < vocab"),
    "gradient without temperature": (
        "tl.load(coefficients + rows) * inverse_temperature",
        "tl.load(coefficients + rows)",
    ),
}

NOTHING = "MISSED"


@pytest.fixture
def triton_rows() -> ModuleType:
    if (reason := unavailable("triton")) or not (rows := rows_module("triton")).INTERPRETED:
        pytest.skip(reason or "not interpreted: the kernels run on a GPU")
    return rows


def mutant(old: str, new: str, folder: Path) -> ModuleType:
    """`triton_kernels`, and the `triton_math` under it, with other words in place of `old`."""
    sources = {m.__name__: Path(m.__file__).read_text() for m in (triton_math, triton_kernels)}
    assert any(old in source for source in sources.values()), f"{old!r} stands in no kernel"
    loaded = None
    for name, source in sources.items():
        leaf = name.rpartition(".")[2]
        source = source.replace(old, new)
        if loaded is not None:
            line = f"from {triton_math.__name__} import"
            assert line in source
            source = source.replace(line, f"from {loaded.__name__} import")
        path = folder / f"{leaf}.py"  # Triton reads the source of its kernels from their file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"mutant_{leaf}", path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[loaded.__name__] = loaded
        spec.loader.exec_module(loaded)
    return loaded


def judge(triton_rows: ModuleType, folder: Path) -> None:
    """What the tests of the rows do, on few problems."""
    for problem in (make_row_problem(3, 37, 37), make_row_problem(2, 4099, 2500)):
        assert_rows_right(triton_rows, problem, both_at(0.5, 0.7))
    late = make_row_problem(2, 4099, 4099)
    late.logits[:, 4000] += 9.0  # peaks of the second section
    assert_rows_right(triton_rows, late, both_at(0.5, 0.7))
    with pytest.MonkeyPatch.context() as patch:  # one section of several blocks
        patch.setattr(triton_rows, "MOST_SECTIONS", 2)
        assert_rows_right(triton_rows, late, both_at(0.5, 0.7))
    assert_right_where_sure(BackEnd(triton_rows, torch.float32, "cpu"), 0.5)
    # Rows 2^30 elements apart, in a sparse file of which only they are touched.
    pitch = 2**30 + 64
    store = torch.from_file(str(folder / "sparse"), shared=True, size=2 * pitch + 70)
    logits = store.as_strided((3, 70), (pitch, 1))
    problem = make_row_problem(3, 70)
    logits.copy_(problem.logits)
    table = triton_rows.row_forward(logits, problem.targets, None, both_at(0.5))
    coefficients = problem.coefficients
    triton_rows.row_backward_(logits, problem.targets, None, table, coefficients, both_at(0.5))


def verdict(triton_rows: ModuleType, folder: Path) -> str:
    try:
        judge(triton_rows, folder)
    except Exception as error:
        words = str(error)
        for kind, pattern in {
            "addresses": "outside of",
            "races": "race|same address",
            "int32": "int32|overflow",
            "numbers": "exceeds|is exactly|changed",
        }.items():
            if re.search(pattern, words):
                return kind
        raise
    return NOTHING


@pytest.mark.slow
def test_planted_faults_are_caught(triton_rows, tmp_path, monkeypatch):
    for name in ("SECTION", "SOFTMAX_BLOCK"):
        monkeypatch.setattr(triton_rows, name, triton_rows.BLOCK)
    assert verdict(triton_rows, tmp_path) == NOTHING  # in the real ones
    found = {}
    for number, (fault, (old, new)) in enumerate(FAULTS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_rows, "kernels", mutant(old, new, folder))
            found[fault] = verdict(triton_rows, folder)
    start = triton_rows._start

    def one_row_more(kernel, grid, *rest, **more):
        start(kernel, (grid[0] + 1, *grid[1:]), *rest, **more)

    monkeypatch.setattr(triton_rows, "_start", one_row_more)
    found["a row too many, unmasked"] = verdict(triton_rows, tmp_path)
    lines = [f"{'planted in the kernels':38}caught by"]
    lines += [f"{fault:38}{by}" for fault, by in found.items()]
    table = "\n".join(["", *lines])
    print(table)
    assert NOTHING not in found.values(), table


STORED = """    divergences += row * (2 * sections) + section
    tl.store(divergences, tl.sum(lanes, 0))
    tl.store(divergences + sections, tl.sum(ratios, 0))
"""
ADDED = """    divergences += row * (2 * sections)
    tl.atomic_add(divergences, tl.sum(lanes, 0))
    tl.atomic_add(divergences + sections, tl.sum(ratios, 0))
"""


def orders_that_differ(triton_rows: ModuleType, vocab: int, beta: float | None) -> list[str]:
    """Orders of the programs that do not give the bits of the grid's own."""
    problem = make_row_problem(2, vocab, None if beta is None else vocab - 1000)
    settings = both_at(0.5 if beta is None else beta)

    def run(order: str) -> Tensor:
        logits = problem.logits.clone()
        side = (logits, problem.targets, problem.teacher)
        with interpret.checked(order):
            table = triton_rows.row_forward(*side, settings)
            triton_rows.row_backward_(*side, table, problem.coefficients, settings)
        return torch.cat((table.flatten(), logits.flatten()))

    expected = run("forwards")
    others = [order for order in interpret.ORDERS if order != "forwards"]
    return [order for order in others if not torch.equal(run(order), expected)]


def test_the_order_of_programs_changes_no_bit(triton_rows, tmp_path, monkeypatch):
    """Of five sections a row; sums by atomics, which are no race, would change some."""
    for name in ("SECTION", "SOFTMAX_BLOCK"):
        monkeypatch.setattr(triton_rows, name, triton_rows.BLOCK)
    vocab = 4 * triton_rows.BLOCK - 7
    for beta in (None, 0.0, 0.5, 1.0):
        assert not orders_that_differ(triton_rows, vocab, beta)
    monkeypatch.setattr(triton_rows, "kernels", mutant(STORED, ADDED, tmp_path))
    monkeypatch.setattr(triton_rows, "_fp32", lambda _, *shape: torch.zeros(shape))
    assert orders_that_differ(triton_rows, vocab, 0.5)
