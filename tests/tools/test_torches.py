"""The table of torches: what makes it fail; and what an older torch's folder gets."""

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from tools import fetch_torch, torches
from tools.torches import KINDS, Line

RIGHT = {"asked": "2.8.0", "torch": "2.8.0+cu128", "cpp": "avx2", "live": True}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, 0, "2.8.0+cu128"),
        ({"failed": 3}, 1, "3 FAILED"),
        ({"passed": dict.fromkeys(KINDS, 7) | {"changing": 0}}, 1, "  0  "),
        ({"live": False, "cpp": "no library"}, 1, "no library"),
        ({"asked": "2.10.0"}, 1, "WRONG: 2.10.0 was asked for"),
    ],
    ids=["right", "failed tests", "no tests of a kind", "no C++ rows", "another torch"],
)
def test_what_fails(monkeypatch, capsys, change, status, words):
    line = Line(**{**RIGHT, "passed": dict.fromkeys(KINDS, 7), **change})
    monkeypatch.setattr(torches, "tested", lambda folder: line)
    assert torches.main(["torch-2.8.0", "--no-installed"]) == status
    assert words in capsys.readouterr().out


def test_every_test_of_torch_compile_has_a_kind():
    """And every kind has tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not processes", *torches.COMPILED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [torches.kind_of(x) for x in done.stdout.splitlines() if "::" in x]
    assert len(found) > 20 and set(found) == KINDS.keys() - {"eager"}
    assert torches.kind_of("tests/kernels/rows/test_rows.py::test_rows[cpu]") == "eager"


def test_older_versions_come_first():
    names = ["torch-2.10.0", "torch-2.8.0", "torch-2.9.1"]
    assert sorted(map(Path, names), key=torches.version_of)[0].name == "torch-2.8.0"


def test_companions_of_a_torch():
    """The small CUDA libraries that a CPU calls, by either way of naming them, and its Triton."""
    of_2_8 = ["filelock", "nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cudnn-cu12==9.10.2.21"]
    of_2_8 += ["nvidia-cuda-cupti-cu12==12.8.90", 'triton==3.4.0; platform_system == "Linux"']
    alone = ["nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cuda-cupti-cu12==12.8.90"]
    assert fetch_torch.companions(of_2_8) == ([*alone, "triton==3.4.0"], [])
    of_2_12 = ["cuda-toolkit[cudart,cufft,cupti]==13.0.2", "nvidia-nccl-cu13==2.29.7"]
    assert fetch_torch.companions(of_2_12) == ([], ["cuda-toolkit[cudart,cupti]==13.0.2"])
    elsewhere = ['nvidia-cuda-runtime-cu12==12.8.90; platform_machine == "sparc"', "triton==3.4.0"]
    assert fetch_torch.companions(elsewhere) == (["triton==3.4.0"], [])


def test_a_stand_in_has_the_symbols_and_aborts_with_their_name(tmp_path):
    """Found as missing from the libraries of a folder, made, loaded, and called."""
    library = tmp_path / "torch/lib"
    library.mkdir(parents=True)
    names = {"": {"nvshmem_barrier"}, "NVSHMEM": {"nvshmem_malloc"}}
    fetch_torch.make_library(tmp_path, "libnvshmem_host.so.3", names)
    user = "void nvshmem_malloc(void); void nvshmem_barrier(void);"
    user += "void use(int n) { if (n) nvshmem_malloc(); else nvshmem_barrier(); }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library / "libuser.so"]
    made = library / "libnvshmem_host.so.3"
    command += ["-Wl,-rpath,$ORIGIN", "-xnone", made]
    subprocess.run(command, input=user, text=True, check=True)
    assert fetch_torch.missing(tmp_path) == {}
    load = f"import ctypes; ctypes.CDLL({str(library / 'libuser.so')!r}).use"
    assert subprocess.run([sys.executable, "-c", load]).returncode == 0
    for n, name in ((1, "nvshmem_malloc"), (0, "nvshmem_barrier")):
        called = [sys.executable, "-c", f"{load}({n})"]
        done = subprocess.run(called, capture_output=True, text=True)
        assert done.returncode != 0 and f"{name} was called" in done.stderr
    made.unlink()
    found = fetch_torch.missing(tmp_path)
    assert found == {"libnvshmem_host.so.3": names}
