"""The repository as a user meets it: imports, what it builds with, the commands in its pages."""

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from installing import run, succeed
from places import IGNORED, ROOT

from tools.environments import EXTRAS, bounds


def text(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


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


def test_setup_refuses_an_older_setuptools_before_it_breaks(tmp_path):
    """One that says it is old, and has nothing that setup.py imports: nothing is fetched."""
    (required,) = pyproject()["build-system"]["requires"]
    for version, refused in (("76.1.0", True), ("77.0.1", False)):
        (tmp_path / "setuptools.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
        done = run([sys.executable, "setup.py", "--version"], PYTHONPATH=str(tmp_path))
        sentence = f"setup.py: kepo is built by {required}, and here is setuptools {version};"
        assert done.returncode != 0 and (sentence in done.stderr) == refused, done.stderr


def test_everything_that_the_loop_needs_has_a_lower_bound():
    """They are what `make installs` installs as the oldest."""
    pins = bounds(EXTRAS)
    assert {"torch==2.8", "transformers==5.5", "peft==0.18"} <= set(pins)  # 5.4 wants torchvision
    with pytest.raises(SystemExit, match="'datasets' has no lower bound"):
        bounds(("hf",))


def test_library_exports_its_interface():
    library = ROOT / "kepo_kernels" / "_rows.so"
    if not library.exists() and os.environ.get("KEPO_REQUIRE_EXT") != "1":
        pytest.skip("kepo_kernels/_rows.so is not built; python -m kepo_kernels says why")
    source = text("csrc/rows.cpp").split('extern "C" {')[1]
    names = re.findall(r"^\w[\w *]*\b(kepo_\w+)\(", source, flags=re.MULTILINE)
    assert len(names) >= 2
    loaded = ctypes.CDLL(str(library))
    assert [name for name in names if not hasattr(loaded, name)] == []


# ---- the commands in README and the other pages

# Programs that are not ours: only the paths and extras they are given are looked at.
OUTSIDE = {
    "git",
    "cd",
    "pip",
    "pip3",
    "export",
    "source",
    "ls",
    "cat",
    "mkdir",
    "tail",
    "head",
    "vllm",
}


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))


def module_exists(name: str) -> bool:
    if name.split(".")[0] in ("kepo", "kepo_kernels"):
        path = ROOT / name.replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(name.split(".")[0]) is not None


def what_is_missing(words: list[str]) -> str | None:
    """What a command names and the repository does not have; None if all is there."""
    while words and re.match(r"\w+=", words[0]):  # VARIABLE=value in front
        words = words[1:]
    if not words:
        return None
    program, arguments = words[0], words[1:]

    for argument in arguments:
        path = ROOT / argument.split("=")[-1].split("::")[0]
        parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ()
        inside = len(parts) > 1 and (ROOT / parts[0]).is_dir() and parts[0] not in IGNORED
        if inside and not any(ROOT.glob("/".join(parts))):  # recipes/*.yaml is one, too
            return f"no file {argument}"
        if extras := re.search(r"(?:^\.|kepo)\[(.+)\]", argument):
            known = pyproject()["project"]["optional-dependencies"]
            return next((f"no extra {e}" for e in extras[1].split(",") if e not in known), None)

    if program == "make":
        targets = [a for a in arguments if not a.startswith("-") and "=" not in a]
        return next((f"no make target {t}" for t in targets if t not in make_targets()), None)
    if re.fullmatch(r"(.*/)?python[\d.]*|torchrun", program):
        for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
            if option == "-m" and value == "kepo":
                return missing_command(arguments[arguments.index("kepo") + 1 :])
            if option == "-m":
                return None if module_exists(value) else f"no module {value}"
            if option == "-c":
                return None
            if not option.startswith("-"):
                return None if (ROOT / option).is_file() else f"no script {option}"
        return None
    if program == "kepo" and program in pyproject()["project"].get("scripts", {}):
        return missing_command(arguments)
    if program in OUTSIDE or ("/" in program and (ROOT / program).is_file()):
        return None
    return f"no program {program}"


def missing_command(arguments: list[str]) -> str | None:
    """Whether `kepo` has no such command."""
    from kepo.__main__ import COMMANDS

    name = " ".join(arguments[:1])
    return None if name in COMMANDS else f"no command kepo {name}"


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


PAGES = ["README.md", "CONTRIBUTING.md", "recipes/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("**/*.md"))


@pytest.mark.parametrize("document", [page for page in PAGES if "```bash\n" in text(page)])
def test_documented_commands_exist(document):
    commands = commands_in(text(document))
    assert commands, f"{document} has no command in its fenced bash blocks"
    missing = {shlex.join(words): what_is_missing(words) for words in commands}
    assert {command: problem for command, problem in missing.items() if problem} == {}


def test_a_folder_that_git_ignores_is_none_of_the_repository(tmp_path, monkeypatch):
    for folder in ("runs", "recipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text(text("pyproject.toml"), encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert what_is_missing(["kepo", "report", "runs/mine"]) is None
    missing = what_is_missing(["kepo", "train", "recipes/mine.yaml"])
    assert missing == "no file recipes/mine.yaml"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("make demo && make tset", "no make target tset"),
        ("X=1 python -m kepo.nothing", "no module kepo.nothing"),
        ("python benchmarks/nothing.py --rows 3", "no file benchmarks/nothing.py"),
        ("python nothing.py", "no script nothing.py"),
        ('pip install -e ".[train,nothing]"', "no extra nothing"),
        ("kepo-train \\\n --steps 3", "no program kepo-train"),
        ("kepo trian recipe.yaml", "no command kepo trian"),
        ("torchrun --nproc-per-node=8 -m kepo trian recipe.yaml", "no command kepo trian"),
        ("kepo plan --table recipes/*.yml", "no file recipes/*.yml"),
        ("python -m pytest tests/test_none.py::test_it", "no file tests/test_none.py::test_it"),
    ],
)
def test_broken_commands_are_noticed(line, problem):
    found = [what_is_missing(words) for words in commands_in(f"```bash\n{line}\n```\n")]
    assert [words for words in found if words] == [problem]
