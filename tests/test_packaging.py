"""The repository as a user meets it: imports, the commands in README, installs of every kind."""

import ctypes
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def text(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(command, *, cwd=ROOT, **environment):
    """Runs a command without this shell's build settings; returns the completed process."""
    dropped = ("KEPO_", "CXX", "LDFLAGS", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | environment
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )


def succeed(command, **kwargs) -> str:
    done = run(command, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads(text("pyproject.toml"))


# ---- the checkout itself


def test_import_is_light():
    """Only torch may come with kepo_kernels: Triton when a GPU asks for it, the rest never."""
    program = (
        "import sys, torch; before = set(sys.modules); import kepo_kernels;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = set(succeed([sys.executable, "-c", program]).split())
    heavy = {"triton", "transformers", "numpy", "sklearn", "PIL", "matplotlib", "yaml", "tqdm"}
    assert "kepo_kernels" in loaded
    assert not loaded & (heavy | {"kepo", "liger_kernel"})


def test_info_names_every_backend():
    words = succeed([sys.executable, "-m", "kepo_kernels"])
    assert all(name in words for name in ("triton", "cpu", "torch")), words


def test_versions_agree():
    import kepo_kernels

    assert kepo_kernels.__version__ == pyproject()["project"]["version"]
    (ruff,) = [r for r in pyproject()["project"]["optional-dependencies"]["test"] if "ruff" in r]
    assert f"rev: v{ruff.removeprefix('ruff==')} " in text(".pre-commit-config.yaml")


def test_building_needs_setuptools_only():
    (requirement,) = pyproject()["build-system"]["requires"]
    assert re.match(r"setuptools\b", requirement)
    assert pyproject()["project"]["dependencies"] == ["torch>=2.8"]


def test_library_exports_its_interface():
    library = ROOT / "kepo_kernels" / "_rows.so"
    if not library.exists() and os.environ.get("KEPO_REQUIRE_EXT") != "1":
        pytest.skip("kepo_kernels/_rows.so is not built; python -m kepo_kernels says why")
    source = text("csrc/rows.cpp").split('extern "C" {')[1]
    names = re.findall(r"^\w[\w *]*\b(kepo_\w+)\(", source, flags=re.MULTILINE)
    assert len(names) >= 2
    loaded = ctypes.CDLL(str(library))
    assert [name for name in names if not hasattr(loaded, name)] == []


# ---- README's commands

# Programs that are not ours: only the paths and extras they are given are looked at.
OUTSIDE = {"git", "cd", "pip", "pip3", "export", "source", "ls", "cat", "mkdir", "tail", "head"}


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))


def module_exists(name: str) -> bool:
    if name.split(".")[0] in ("kepo", "kepo_kernels"):
        path = ROOT / name.replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(name.split(".")[0]) is not None


def what_is_missing(words: list[str]) -> str | None:
    """What one command of README names and the repository does not have; None if all is there."""
    while words and re.match(r"\w+=", words[0]):  # VARIABLE=value in front
        words = words[1:]
    if not words:
        return None
    program, arguments = words[0], words[1:]

    for argument in arguments:
        path = ROOT / argument.split("=")[-1].split("::")[0]
        inside = len(path.relative_to(ROOT).parts) > 1 if path.is_relative_to(ROOT) else False
        if inside and (ROOT / path.relative_to(ROOT).parts[0]).is_dir() and not path.exists():
            return f"no file {argument}"
        if extras := re.search(r"(?:^\.|kepo)\[(.+)\]", argument):
            known = pyproject()["project"]["optional-dependencies"]
            return next((f"no extra {e}" for e in extras[1].split(",") if e not in known), None)

    if program == "make":
        targets = [a for a in arguments if not a.startswith("-") and "=" not in a]
        return next((f"no make target {t}" for t in targets if t not in make_targets()), None)
    if re.fullmatch(r"(.*/)?python[\d.]*|torchrun", program):
        for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
            if option == "-m":
                return None if module_exists(value) else f"no module {value}"
            if option == "-c":
                return None
            if not option.startswith("-"):
                return None if (ROOT / option).is_file() else f"no script {option}"
        return None
    if program in OUTSIDE or ("/" in program and (ROOT / program).is_file()):
        return None
    return f"no program {program}"


def commands_in(markdown: str) -> list[list[str]]:
    """Every command of the fenced bash blocks, as words."""
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    commands = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in {";", "&&", "||", "|", "&"}:
                commands += [command] if command else []
                command = []
            else:
                command.append(word)
    return commands


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document):
    commands = commands_in(text(document))
    assert commands, f"{document} has no fenced bash block"
    missing = {shlex.join(words): what_is_missing(words) for words in commands}
    assert {command: problem for command, problem in missing.items() if problem} == {}


@pytest.mark.parametrize(
    "line, problem",
    [
        ("make demo && make tset", "no make target tset"),
        ("X=1 python -m kepo.nothing", "no module kepo.nothing"),
        ("python benchmarks/nothing.py --rows 3", "no file benchmarks/nothing.py"),
        ("python nothing.py", "no script nothing.py"),
        ('pip install -e ".[train,nothing]"', "no extra nothing"),
        ("kepo-train \\\n --steps 3", "no program kepo-train"),
        ("python -m pytest tests/test_none.py::test_it", "no file tests/test_none.py::test_it"),
    ],
)
def test_broken_commands_are_noticed(line, problem):
    found = [what_is_missing(words) for words in commands_in(f"```bash\n{line}\n```\n")]
    assert [words for words in found if words] == [problem]


# ---- installing into environments that hold torch and what torch needs, nothing else


def installs(test):
    return pytest.mark.slow(pytest.mark.packaging(test))


SMOKE = """
import importlib.util, torch, kepo_kernels
for absent in ("triton", "transformers"):
    assert importlib.util.find_spec(absent) is None, absent
hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
lm_head = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
rows = torch.arange(6)
want = (hidden @ lm_head.T).log_softmax(-1)[rows, rows]
got = kepo_kernels.fused_linear_logprobs(hidden, lm_head, rows, impl="{impl}")
torch.testing.assert_close(got, want)
torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (got, want)))
"""


def torch_and_its_needs(name: str = "torch", found: dict | None = None) -> dict:
    """Installed distributions that torch requires, Triton apart (CPU builds live without it)."""
    requirements = pytest.importorskip("packaging.requirements")
    found = {} if found is None else found
    if name not in found and name != "triton":
        found[name] = metadata.distribution(name)
        for line in found[name].requires or []:
            needed = requirements.Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                torch_and_its_needs(needed.name.lower(), found)
    return found


def torch_only_python(where: Path) -> Path:
    """A fresh environment, in which torch is linked, not copied."""
    succeed([sys.executable, "-m", "venv", "--without-pip", where])
    python = where / "bin" / "python"
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(succeed([python, "-c", program]).strip())
    for distribution in torch_and_its_needs().values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


def pip(*arguments, python=sys.executable, **environment):
    return run([sys.executable, "-m", "pip", "--python", python, *arguments], **environment)


def wheel(source: Path, where: Path, *, isolated: bool = False, **environment) -> Path:
    isolation = [] if isolated else ["--no-build-isolation"]
    done = pip("wheel", "--no-deps", *isolation, "-w", where, source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = where.glob("*.whl")
    return built


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
