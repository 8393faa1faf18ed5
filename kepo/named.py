"""Find a function or class by the name that a recipe gives it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from typing import Any

from kepo.errors import KepoConfigError, first_line


def found(which: str, name: str) -> Any:
    """Return what ``package.module:name`` or ``folder/file.py:name`` names.

    A file is read relative to the working directory, and once in a process unless it has changed;
    so is a package, if it is not installed. They may import their neighbours, at once or later.
    Raises KepoConfigError, which begins with ``which``, if file, module or name is not there, or if
    importing it fails.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise KepoConfigError(f"{which}={name!r}; expected package.module:name or file.py:name")
    if source.endswith(".py") and not Path(source).expanduser().is_file():
        raise KepoConfigError(f"{which}={name!r}: there is no file {source} in {Path.cwd()}")
    try:
        module = _file(Path(source)) if source.endswith(".py") else _module(source)
    except (Exception, SystemExit) as error:  # of code that is not ours
        raise KepoConfigError(
            f"{which}={name!r}: importing {source} raised {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        raise KepoConfigError(f"{which}={name!r}: {source} has no {attribute}")
    return getattr(module, attribute)


def source_of(name: str) -> Path | None:
    """Return the file of the object that a name, which was `found`, names; None if its module has
    no file."""
    source = name.rpartition(":")[0]
    if source.endswith(".py"):
        return Path(source).expanduser()
    file = getattr(sys.modules.get(source), "__file__", None)
    return None if file is None else Path(file)


def _module(name: str) -> Any:
    if name.startswith("."):
        raise ImportError("a relative name; expected a package's name from its first part on")
    _neighbours(Path.cwd())  # a command, unlike `python -m`, does not look there
    return importlib.import_module(name)


def _neighbours(folder: Path) -> None:
    """Let functions import what lies in the folder also when they are called: after all else."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _file(path: Path) -> Any:
    path = path.expanduser().resolve()
    name = f"kepo_user_{path.stem}_{zlib.crc32(bytes(path) + path.read_bytes())}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    _neighbours(path.parent)
    return module
