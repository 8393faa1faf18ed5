"""The CPU rows under AddressSanitizer and UBSan, on random inputs: csrc/fuzz_rows.cpp."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # it compiles the library anew
ROOT = Path(__file__).parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-Og", "-std=c++17", "-pthread", "-Wno-psabi", "-fno-math-errno", "-DKEPO_FUZZ=1"]


def kernel_flags() -> dict[str, list[str]]:
    """The sources of the library with the flags that setup.py compiles each of them with."""
    spec = importlib.util.spec_from_file_location("kepo_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    target = setup.output_of([*setup.find_compiler(), "-dumpmachine"])
    return setup.X86 if target.startswith("x86_64") else setup.PORTABLE


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    """The harness, built."""
    pytest.importorskip("setuptools")
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler, or not Linux")
    build = tmp_path_factory.mktemp("fuzz")
    empty = build / "empty.cpp"
    empty.write_text("int main() {}\n")
    command = [compiler, *SANITIZERS, empty, "-o", build / "empty"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined sanitizers")

    objects, running = [], []
    for name, flags in (kernel_flags() | {"fuzz_rows.cpp": []}).items():
        objects.append(build / f"{name}.o")
        command = [compiler, *FLAGS, *SANITIZERS, *flags, "-c", ROOT / "csrc" / name]
        running.append(subprocess.Popen([*command, "-o", objects[-1]]))
    assert not any(process.wait() for process in running)
    link = [compiler, "-pthread", *SANITIZERS, *objects, "-o", build / "fuzz_rows"]
    subprocess.run(link, check=True)
    return build / "fuzz_rows"


def fuzz(fuzzer: Path, *arguments: str, timeout: int = 250) -> subprocess.CompletedProcess:
    # Under that check GCC before 14 misaligns what AVX-512 keeps on the stack (its bug 110027).
    known = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    command = [fuzzer, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=known)


def assert_nothing_found(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0 and "nothing found" in done.stdout, done.stdout + done.stderr


def test_fuzz(fuzzer):
    assert_nothing_found(fuzz(fuzzer, "--inputs", "20000"))


@pytest.mark.timeout(3600)
def test_fuzz_a_million_inputs(fuzzer):
    assert_nothing_found(fuzz(fuzzer, "--inputs", "1000000", "--seed", "1", timeout=3500))


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("over-read", r"AddressSanitizer: .*\bREAD of size"),
        ("over-write", r"AddressSanitizer: .*\bWRITE of size"),
        ("changed-teacher", "the teacher changed"),
        ("lost-nan", "a NaN did not reach"),
    ],
)
def test_planted_faults_are_reported(fuzzer, fault, report):
    done = fuzz(fuzzer, "--inputs", "2000", "--plant", fault)
    assert done.returncode != 0
    assert re.search(report, done.stderr, re.DOTALL), done.stderr
