"""The offline compilation gate: it passes good kernels and names each planted fault.

Triton is interpreted in this process, so whatever compiles runs in another: this file as a script
compiles the planted kernels and prints their reports.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from places import ROOT, SUPPORT

PATHS = (str(ROOT), str(SUPPORT), str(Path(__file__).parent))
COMMAND = ROOT / "tools" / "compile_kernels.py"

try:
    import triton
    import triton.language as tl
except ImportError:
    pytest.skip("Triton is not installed", allow_module_level=True)


@triton.jit
def sound(x, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lanes
        total += tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def row_of_32_bits(x, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.load(x + row * stride + lanes, mask=lanes < width, other=0.0)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def atomic(x, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.load(x + row * stride + lanes, mask=lanes < width, other=0.0)
    tl.atomic_add(out, tl.sum(total, 0))


@triton.jit
def narrow(x, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.load(x + row * stride + lanes + 1, mask=lanes < width, other=0.0)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def spilling(x, out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    block = tl.load(x + row * stride + lanes, mask=lanes < width, other=0.0)
    scaled = tl.exp(block - tl.max(block, 0))
    tl.store(x + row * stride + lanes, scaled / tl.sum(scaled, 0) + block, mask=lanes < width)


@triton.jit
def tensor_float(x, out, stride, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    square = lanes[:, None] * BLOCK + lanes[None, :]
    a = tl.load(x + square)
    tl.store(out + square, tl.dot(a, a, input_precision="tf32"))


@triton.jit
def shared_memory(x, out, stride, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    square = lanes[:, None] * BLOCK + lanes[None, :]
    a = tl.load(x + square)
    b = tl.load(out + square)
    tl.store(out + square, tl.dot(a, b, input_precision="ieee"))


@triton.jit
def undefined(x, out, stride, width, BLOCK: tl.constexpr):
    tl.store(out, nowhere)  # noqa: F821


# Kernel, target, BLOCK, warps -> the beginning of the fault that must be named.
PLANTED = {
    ("sound", "sm_90", 1024, 4): None,
    ("sound", "gfx942", 1024, 4): None,
    ("row_of_32_bits", "sm_90", 1024, 4): "32-bit row arithmetic: ",
    ("atomic", "sm_80", 1024, 4): "atomic: ",
    ("atomic", "gfx942", 1024, 4): "atomic: ",
    ("narrow", "sm_90", 1024, 4): "narrow load: 4 bytes",
    ("narrow", "gfx942", 1024, 4): "narrow load: 4 bytes",
    ("spilling", "sm_120", 8192, 1): "spills: ",
    ("spilling", "gfx950", 16384, 1): "spills: ",
    ("tensor_float", "sm_90", 32, 4): "TF32: ",
    ("shared_memory", "gfx942", 256, 8): "shared memory: ",
    ("undefined", "sm_90", 32, 1): "does not compile: ",
}


def compile_planted() -> None:
    """The script: a JSON list of the faults of each planted kernel."""
    import tempfile

    import test_compile_kernels as here  # by its importable name, as a worker finds it
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tools import compile_kernels

    found = []
    with tempfile.TemporaryDirectory() as cache:
        compile_kernels._start_worker(cache)
        for name, target, block, warps in PLANTED:
            with FakeTensorMode():
                x = torch.empty(64, 1024, device="cuda")
                args = (x, torch.empty(64, device="cuda"), 1024, 1024)
                options = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
                kernel = getattr(here, name)
                variant = compile_kernels.specialised(kernel, target, args, options)
            found.append(compile_kernels.judged(variant)[1].faults)
    print(json.dumps(found))


def run(*words: str | Path, paths: Iterable[str] = PATHS) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted() -> list[list[str]]:
    done = run(__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # .ci/run has it, before the gate itself
@pytest.mark.parametrize(
    "number", range(len(PLANTED)), ids=lambda i: "-".join(list(PLANTED)[i][:2])
)
def test_planted_faults_are_named(planted, number):
    expected = list(PLANTED.values())[number]
    if expected is None:
        assert planted[number] == []
    else:
        assert [fault for fault in planted[number] if fault.startswith(expected)], planted[number]


@pytest.mark.slow
def test_our_kernels_pass_on_two_targets(tmp_path):
    results = tmp_path / "variants.csv"
    done = run(COMMAND, "--quick", "--csv", results)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    import csv

    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    assert all(row["commit"] and row["triton"] and int(row["registers"]) > 0 for row in rows)
    nvidia = [row for row in rows if row["target"] == "sm_90"]
    assert any(row["narrowest_load"] == row["widest_load"] == "16" for row in nvidia)


@pytest.mark.slow
def test_a_default_that_old_tritons_cannot_compile_is_caught(tmp_path):
    """What once kept every loss from running with Triton 3.4 to 3.6: a default that is a string.

    KEPO_OLD_TRITON is a folder with such a Triton, as .ci/run gives one.
    """
    old = os.environ.get("KEPO_OLD_TRITON")
    if not old:
        pytest.skip("KEPO_OLD_TRITON is not set")
    for name in ("kepo_kernels", "tools"):
        unneeded = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unneeded)
    rows = tmp_path / "kepo_kernels" / "rows"
    math, kernels = (rows / f"triton_{x}.py" for x in ("math", "kernels"))
    plant(math, r"(def read\([^)]*EVICT: tl\.constexpr)", r'\1 = ""')
    for path in (math, kernels):
        plant(path, r'(\bread\([^()]*), ""\)', r"\1)")

    paths = [str(Path(old).resolve()), str(tmp_path)]
    done = run(tmp_path / "tools" / COMMAND.name, "--quick", "--target", "sm_90", paths=paths)
    assert done.returncode == 1, done.stdout + done.stderr
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT ")]
    assert faults and all("FAULT does not compile: CompilationError" in line for line in faults)
    assert re.search(r"^triton 3\.[456]\.\S*: \d+ variants .* [1-9]\d* faults$", done.stdout, re.M)


def plant(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text())
    assert count, f"{path.name} has nothing like {pattern}: the test must plant it another way"
    path.write_text(text)


@pytest.mark.parametrize(
    "arguments, word", [(["--target", "sm_1"], "sm_80"), (["--jobs", "0"], "at least 1")]
)
def test_bad_arguments_are_refused(arguments, word):
    done = run(COMMAND, *arguments)
    assert done.returncode == 2 and word in done.stderr


def test_interpreted_kernels_are_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, COMMAND, "--quick"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unset it" in done.stderr


if __name__ == "__main__":
    compile_planted()
