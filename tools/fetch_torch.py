"""An older torch in a folder of its own, able to be imported on a machine without a GPU.

    python tools/fetch_torch.py .venv/torch-2.8.0
    PYTHONPATH=.venv/torch-2.8.0:. python -m pytest tests/kernels/compute/test_compile.py

On PyPI the wheels of torch for x86-64 are CUDA builds, which want 3 to 5 GB of CUDA
libraries before they can be imported, and call none of them on a CPU. Here the folder gets the
wheel as it is published, the Triton that it names and the two small CUDA libraries that it does
call (cudart, cupti). Each other one is a stand-in that the C compiler makes on the spot: the same
SONAME, and for every symbol that torch needs a function that says its name and aborts. So what runs
on the CPU is torch itself, and what a CPU cannot run ends the process with a sentence.

2.2 GB and half a minute for each, of which 0.5 to 0.9 GB come over the network. Needs a C compiler
and readelf. Its Python dependencies are those of the environment that it is used in.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

CALLED = ("cudart", "cupti")  # by torch on a CPU, too: "is there a GPU?"
CUDA = re.compile(r"lib(cu(?!da\.)|nccl|nv)")  # libcuda.so is the driver's, and opened on demand


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="each named torch-VERSION")
    for folder in parser.parse_args(arguments).folders:
        fetch(folder.resolve())


def fetch(folder: Path) -> None:
    version = folder.name.removeprefix("torch-")
    install(folder, "--no-deps", f"torch=={version}")
    alone, with_parts = companions(torch_of(folder).requires or [])
    if alone:
        install(folder, "--no-deps", *alone)
    if with_parts:
        install(folder, *with_parts)
    made = [make_library(folder, soname, names) for soname, names in missing(folder).items()]
    found = imported(folder)
    print(f"{folder}: torch {found}; stand-ins: {' '.join(made) or 'none'}")
    if not found.startswith(version):
        raise SystemExit(f"{folder}: expected torch {version}, and {found} was imported")


def install(folder: Path, *words: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Without pip's cache: the folder is one.
    there = ["--no-cache-dir", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *there, *words], check=True)


def torch_of(folder: Path) -> Distribution:
    found = [x for x in distributions(path=[str(folder)]) if x.metadata["Name"] == "torch"]
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one torch in it, found {len(found)}")
    return found[0]


def companions(requires: list[str]) -> tuple[list[str], list[str]]:
    """What to install of a torch's requirements: by itself, and with what it is made of."""
    alone, with_parts = [], []
    for requirement in map(Requirement, requires):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name == "triton" or re.match(
            "nvidia-cuda-(runtime|cupti)", requirement.name
        ):
            alone.append(f"{requirement.name}{requirement.specifier}")
        elif requirement.name == "cuda-toolkit":
            with_parts.append(f"cuda-toolkit[{','.join(CALLED)}]{requirement.specifier}")
    return alone, with_parts


def missing(folder: Path) -> dict[str, dict[str, set[str]]]:
    """The CUDA libraries that torch loads and the folder lacks, and the symbols it needs of each.

    By symbol version, "" where they have none; such are told apart by their prefix.
    """
    wanted: dict[str, dict[str, set[str]]] = {}
    plain = set()
    for library in sorted((folder / "torch/lib").glob("lib*.so")):
        for soname in re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", library)):
            wanted.setdefault(soname, {})
        library_of, current = {}, ""
        versions = readelf("--version-info", library)
        for soname, version in re.findall(r"File: (\S+)|Name: (\S+)  Flags", versions):
            current = soname or current
            if version:
                library_of[version] = current
        symbols = readelf("--dyn-syms", library)
        for name, version in re.findall(r" UND (\w+)(?:@([\w.]+))?", symbols):
            if version:
                soname = library_of[version]
                wanted.setdefault(soname, {}).setdefault(version, set()).add(name)
            else:
                plain.add(name)
    present = {path.name for path in folder.glob("nvidia/**/*.so*")}
    present |= {path.name for path in (folder / "torch/lib").iterdir()}
    lacking = {x: names for x, names in wanted.items() if CUDA.match(x) and x not in present}
    for soname, names in lacking.items():
        prefix = soname.removeprefix("lib").split(".")[0].split("_")[0].lower()
        names[""] = {name for name in plain if name.lower().startswith(prefix)}
    return lacking


def readelf(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_library(folder: Path, soname: str, names: dict[str, set[str]]) -> str:
    """A shared library beside torch's own, where torch looks as well."""
    source = ["#include <stdio.h>", "#include <stdlib.h>"]
    source += [
        f'void {name}(void) {{ fputs("{name} was called, but {soname} is a stand-in: this torch '
        'is for CPUs only\\n", stderr); abort(); }'
        for name in sorted(set().union(*names.values()))
    ]
    versions = [
        f"{version} {{ global: {' '.join(f'{name};' for name in sorted(of))} }};\n"
        for version, of in names.items()
        if version
    ]
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "versions")
        script.write_text("".join(versions), encoding="utf-8")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-fno-builtin"]
        command += ["-x", "c", "-", f"-Wl,-soname,{soname}"]
        command += [f"-Wl,--version-script={script}"] if versions else []
        command += ["-o", str(folder / "torch/lib" / soname)]
        subprocess.run(command, input="\n".join(source), text=True, check=True)
    return soname


def imported(folder: Path) -> str:
    """The version of the torch that a process imports which finds the folder first."""
    there = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    done = subprocess.run(command, env=there, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
