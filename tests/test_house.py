"""The shape of the packages: imports run one way, names are unique, functions and folders short,
settings are handed on by section."""

import ast
import graphlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

import kepo_kernels

PACKAGES = ("kepo_kernels", "kepo", "experiments")
LINES = 80
"""Of a function, its docstring and signature left out."""
FILES = 13
"""Of a folder, beside __init__.py."""
WHOLE = 12
"""Functions of kepo that take all settings; the others take a section of them, or values."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(f): f for package in PACKAGES for f in (ROOT / package).rglob("*.py")}


def imported_by(file: Path) -> set[str]:
    """The modules of these packages that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Of each module but the packages' own, which only pass names on to users."""
    own = {name: imported_by(file) - {name} for name, file in MODULES.items()}
    return {name: found - set(PACKAGES) for name, found in own.items() if name not in PACKAGES}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def floor(module: str) -> str:
    """A folder of a package, or a file at its door."""
    return ".".join(module.split(".")[:2])


def test_no_file_imports_in_a_circle(imports):
    assert circle(imports) is None
    assert circle(imports | {"kepo.errors": {"kepo.loop"}})  # it would be seen


def test_no_folder_imports_in_a_circle(imports):
    folders: dict[str, set[str]] = {}
    for module, found in imports.items():
        folders.setdefault(floor(module), set()).update(map(floor, found))
    for name, found in folders.items():
        found.discard(name)
    assert circle(folders) is None


def test_packages_know_only_those_below(imports):
    for place, package in enumerate(PACKAGES):
        below = PACKAGES[: place + 1]
        for module in (name for name in imports if name.split(".")[0] == package):
            assert {name.split(".")[0] for name in imports[module]} <= set(below), module


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_name_twice_in_a_package(package):
    names = Counter(f.name for f in (ROOT / package).rglob("*.py") if f.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_all_that_kepo_kernels_exports_is_listed():
    public = {name: x for name, x in vars(kepo_kernels).items() if not name.startswith("_")}
    exported = [name for name, x in public.items() if not isinstance(x, ModuleType)]
    assert sorted(exported) == sorted(kepo_kernels.__all__)


def test_functions_and_folders_are_short():
    long = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                if node.end_lineno - first.lineno + 1 > LINES:
                    long.append(f"{module}.{node.name}")
    assert long == []
    files = Counter(f.parent for f in MODULES.values() if f.name != "__init__.py")
    assert {str(folder): count for folder, count in files.items() if count > FILES} == {}


def takes_all_settings(function: ast.FunctionDef) -> bool:
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    hints = [ast.unparse(one.annotation) for one in every if one.annotation]
    return any({"Config"} & {*hint.replace("|", " ").split()} for hint in hints)


def test_few_functions_take_all_settings():
    found = [
        f"{module}.{node.name}"
        for module, file in MODULES.items()
        if module.split(".")[0] == "kepo"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and takes_all_settings(node)
    ]
    assert "kepo.loop.train" in found and len(found) <= WHOLE, found
