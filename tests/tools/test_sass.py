"""Instructions per column: which loop is counted, and by how many columns they are divided."""

import csv
import os
import subprocess
import sys

import pytest
from places import ROOT

try:
    import triton  # noqa: F401
except ImportError:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tools import sass
from tools.kernel_table import Variant

VARIANT = Variant("", "softmax_kernel", "sm_90", (("logits", "*fp32"),), (), (), ())


def code(*lines: str) -> list[sass.Instruction]:
    """Instructions at 0x0000, 0x0010, ... as cuobjdump prints them."""
    text = [f"        /*{16 * n:04x}*/   {line} ;   /* 0x00 */" for n, line in enumerate(lines)]
    return sass.parsed("\n".join(text))


# A loop of four instructions from 0x0020 on, with a rare path at the kernel's end.
PLAIN = code(
    "LDG.E R0, desc[UR4][R2.64]",
    "ISETP.GE.AND P0, PT, R0, R1, PT",
    "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
    "@P1 BRA 0x90",
    "FADD R4, R4, R5",
    "MUFU.EX2 R6, R4",
    "@P0 BRA 0x20",
    "STG.E desc[UR4][R2.64], R4",
    "EXIT",
    "FMUL R4, R4, R5",
    "BRA 0x40",
)


def test_a_loop_is_what_lies_on_a_way_back_to_its_load():
    loop = sass.hot_loop(PLAIN)
    assert " ".join(x.name for x in loop) == "LDG.E.128 BRA FADD MUFU.EX2 BRA FMUL BRA"


def test_of_two_loops_that_which_loads_more_is_hot():
    loop = sass.hot_loop(
        code(
            "LDG.E.128 R4, desc[UR4][R2.64]",
            *["FADD R4, R4, R5"] * 9,
            "@P0 BRA 0x0",
            "LDG.E.128 R4, desc[UR4][R2.64]",
            "LDG.E.128 R8, desc[UR4][R6.64]",
            "FADD R4, R4, R8",
            "@P0 EXIT",
            "BRA 0xb0",
        )
    )
    assert " ".join(x.kind for x in loop) == "LDG LDG FADD EXIT BRA"


def test_a_pipelined_loop_is_its_body():
    """Of loads to shared memory, and back; the first ones stand before the loop."""
    loop = sass.hot_loop(
        code(
            "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
            "LDGDEPBAR",
            "DEPBAR.LE SB0, 0x0",
            "LDS.128 R4, [R1]",
            "FADD R4, R4, R5",
            "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], !P1",
            "LDGDEPBAR",
            "@P0 BRA 0x20",
            "LDS.128 R4, [R1]",
            "EXIT",
        )
    )
    assert " ".join(x.kind for x in loop) == "DEPBAR LDS FADD LDGSTS LDGDEPBAR BRA"
    assert sass.columns_of(loop, 4, None, 4, VARIANT) == 4


def test_barriers_are_left_where_they_say():
    loop = sass.hot_loop(
        code(
            "LDG.E.128 R4, desc[UR4][R2.64]",
            "BSSY B2, 0x50",
            "@!P1 BRA 0x40",
            "CALL.REL.NOINC 0x80",
            "BSYNC B2",
            "FADD R4, R4, R5",
            "@P0 BRA 0x0",
            "EXIT",
            "FMUL R4, R4, R5",
            "RET.REL.NODEC R6",
        )
    )
    assert " ".join(x.kind for x in loop) == "LDG BSSY BRA CALL BSYNC FADD BRA"


def test_without_a_loop_nothing_is_counted():
    with pytest.raises(SystemExit, match="no loop"):
        sass.hot_loop(code("LDG.E.128 R4, desc[UR4][R2.64]", "EXIT"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.EF.64", 8),
        ("LDG.E", 4),
        ("LDG.E.U16", 2),
        ("LDG.E.S8", 1),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("STG.E.EL.128", 16),
    ],
)
def test_widths(name, expected):
    assert code(f"{name} R4, desc[UR4][R2.64]")[0].bytes == expected


def test_columns_are_those_that_were_loaded_and_stored():
    load, store = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4"
    assert sass.columns_of(code(load, load), 4, None, 8, VARIANT) == 8
    assert sass.columns_of(code(load, load, load, load), 4, None, 8, VARIANT) == 16  # unrolled
    assert sass.columns_of(code(load, load, load, load), 8, None, 8, VARIANT) == 8  # two matrices
    assert sass.columns_of(code(load, load, store), 4, 2, 8, VARIANT) == 8


@pytest.mark.parametrize(
    ("lines", "stored"),
    [
        (["LDG.E.128 R4, x"], None),  # half of a round
        (["LDG.E.128 R4, x", "LDG.E.128 R4, x", "LDG.E R4, x"], None),  # and a number besides
        (["FADD R4, R4, R5"], None),
        (["LDG.E.128 R4, x", "LDG.E.128 R4, x"], 2),  # a store that is missing
        (["LDG.E.128 R4, x", "LDG.E.128 R4, x", "STG.E.128 x, R4"], None),
    ],
)
def test_what_does_not_fit_is_an_error(lines, stored):
    with pytest.raises(SystemExit, match="expected multiples of 8 columns"):
        sass.columns_of(code(*lines), 4, stored, 8, VARIANT)


@pytest.mark.slow
def test_our_kernels(tmp_path):
    """All variants are counted, with loads of 16 bytes, and none does its work for nothing."""
    results = tmp_path / "sass.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(ROOT / "tools" / "sass.py"), "--csv", str(results)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kernel"], row["teacher"]) for row in rows}
    assert {("softmax_kernel", "none"), ("divergence_kernel", "mixture")} <= found
    assert {
        ("backward_kernel", kind) for kind in ("none", "forward", "reverse", "mixture")
    } <= found
    assert all(row["widest_load"] == "16" and row["triton"] and row["commit"] for row in rows)
    assert all(5 < float(row["instructions"]) < 300 and float(row["mufu"]) > 0 for row in rows)
    assert all(int(row["columns"]) >= 8 and int(row["registers"]) > 0 for row in rows)
