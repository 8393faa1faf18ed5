"""Builds csrc/ into kepo_kernels/_rows.so; everything else about the package is in pyproject.toml.

The library has a C interface, loaded with ctypes, and links against neither Python nor torch. So
one binary serves every version of both, the wheel is `py3-none-<platform>`, and building needs a
C++ compiler and setuptools only.

A failed build does not fail the install: the reason goes to kepo_kernels/_build_info.json, where
`python -m kepo_kernels` finds it, and the kernels run on torch alone. Environment:

    KEPO_REQUIRE_EXT=1    a failed build fails the install
    KEPO_SKIP_EXT=1       build nothing; the wheel is `py3-none-any`
    CXX, CXXFLAGS, LDFLAGS    as usual; ours come after CXXFLAGS
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

# pip sees to this by itself, unless it is told --no-build-isolation. An older one stops at an
# import below, or at the licence in pyproject.toml, and says nothing of its age.
OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"setup.py: kepo is built by setuptools>={OLDEST_SETUPTOOLS}, and here is setuptools "
        f"{setuptools.__version__}; pip install 'setuptools>={OLDEST_SETUPTOOLS}', or leave out "
        "--no-build-isolation"
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

# No -ffast-math: NaN and infinity in the logits must come out as they went in.
COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-pthread", "-Wno-psabi"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AVX512_FLAGS += ["-mprefer-vector-width=512", "-ffp-contract=fast"]

# In link order, from the least instruction set up. Where two objects hold the same inline function
# of the standard library the linker keeps the first, and that one must run on every processor.
PORTABLE = {"rows.cpp": [], "rows_baseline.cpp": []}
X86 = {
    "rows.cpp": ["-DKEPO_X86=1"],
    "rows_baseline.cpp": [],
    "rows_avx2.cpp": AVX2_FLAGS,
    "rows_avx512.cpp": AVX512_FLAGS,
}
INFO = "_build_info.json"


class BuildFailed(Exception):
    """The library could not be built; the message is what the user needs to see."""


def switched_on(name: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"setup.py: {name}={value!r}, expected 0 or 1")
    return value == "1"


def output_of(command: list[str]) -> str:
    """Runs `command` and returns what it printed; BuildFailed with its own words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildFailed(f"cannot run {shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        words = (done.stderr + done.stdout).strip() or "it printed nothing"
        first_lines = "\n".join(words.splitlines()[:40])  # a C++ error cascade can be endless
        raise BuildFailed(
            f"{shlex.join(command)}\nfailed with status {done.returncode}: {first_lines}"
        )
    return done.stdout.strip()


def find_compiler() -> list[str]:
    """The C++ compiler and its arguments: $CXX if set, else the first one on the PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildFailed("no C++ compiler: looked for c++, g++ and clang++ on the PATH, CXX is unset")


def build_library(output: Path, objects_dir: Path, info: dict) -> None:
    """Compiles and links `output`; fills `info` on the way, so a failure tells how far it came."""
    compiler = find_compiler()
    info["compiler"] = shlex.join(compiler)
    target = output_of([*compiler, "-dumpmachine"])
    version = output_of([*compiler, "--version"]).splitlines()
    info["compiler"] += f": {version[0] if version else 'unknown version'}, {target}"

    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    objects = []
    for name, own_flags in (X86 if target.startswith("x86_64") else PORTABLE).items():
        flags = [*user_flags, *COMMON_FLAGS, *own_flags]
        info["flags"][name] = shlex.join(flags)
        objects.append(str(objects_dir / name.replace(".cpp", ".o")))
        output_of([*compiler, *flags, "-c", f"csrc/{name}", "-o", objects[-1]])
    link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
    output_of([*compiler, "-shared", "-pthread", *objects, *link_flags, "-o", str(output)])


class BuildRows(build_ext):
    """build_ext for a plain shared library that may be missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        library, info_file = self._built_files(ext)
        library.parent.mkdir(parents=True, exist_ok=True)
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # an older build must not stand in for a failed one

        info = {"built": False, "error": "", "compiler": "", "flags": {}}
        if switched_on("KEPO_SKIP_EXT"):
            info["error"] = "skipped: KEPO_SKIP_EXT=1 was set at install time"
        else:
            try:
                build_library(library, objects_dir, info)
                info["built"] = True
            except BuildFailed as error:
                info["error"] = str(error)
                if switched_on("KEPO_REQUIRE_EXT"):
                    raise CompileError(f"KEPO_REQUIRE_EXT=1 and {error}") from error
                print(
                    "\nWARNING: the C++ row kernels of kepo_kernels were not built; on the CPU the "
                    f"losses will run on torch alone, slower.\n{error}\n",
                    file=sys.stderr,
                )
        info_file.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: built files go beside the sources, stale ones go away."""
        for built, beside_source in self.get_output_mapping().items():
            self.copy_file(built, beside_source)
        for ext in self.extensions:
            library, _ = self._built_files(ext)
            if not library.exists():
                (self._source_dir() / library.name).unlink(missing_ok=True)

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        built = [path for ext in self.extensions for path in self._built_files(ext)]
        return {str(path): str(self._source_dir() / path.name) for path in built if path.exists()}

    def get_outputs(self) -> list[str]:
        built = [path for ext in self.extensions for path in self._built_files(ext)]
        return [str(path) for path in built if path.exists()]

    def _built_files(self, ext: Extension) -> tuple[Path, Path]:
        library = Path(self.build_lib, self.get_ext_filename(ext.name))
        return library, library.with_name(INFO)

    def _source_dir(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("kepo_kernels"))


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        if switched_on("KEPO_SKIP_EXT"):
            return "py3", "none", "any"
        tag = super().get_tag()[2].replace("universal2", platform.machine())  # macOS: built for one
        return "py3", "none", tag


if __name__ == "__main__":
    if switched_on("KEPO_SKIP_EXT") and switched_on("KEPO_REQUIRE_EXT"):
        raise SystemExit("setup.py: KEPO_SKIP_EXT=1 and KEPO_REQUIRE_EXT=1 contradict; unset one")
    rows = Extension(
        "kepo_kernels._rows",
        sources=[f"csrc/{name}" for name in X86],
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    )
    setup(ext_modules=[rows], cmdclass={"build_ext": BuildRows, "bdist_wheel": PlatformWheel})
