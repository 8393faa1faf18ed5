"""A YAML file of settings: words are kept as written, every mistake is reported in a sentence."""

from __future__ import annotations

import codecs
import stat
from functools import cache
from pathlib import Path
from typing import Any

from kepo.errors import KepoConfigError, packages_named
from kepo.words import Word

LARGEST = 2**20
"""The most bytes a config file may have: a thousand times what all settings take."""


def read_mapping(path: Path, otherwise: str) -> dict[str, Any]:
    """Read the mapping in the file, with its plain scalars as ``Word``, which the types of the
    settings turn into values.

    otherwise: what else could have been named, for the error about a missing file. Raises
    KepoConfigError for a file that cannot be read, is not YAML, has a key twice or is no mapping.
    """
    with packages_named(str(path)):
        import yaml

    text = _text(path, otherwise)
    try:
        content = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        kind = "" if isinstance(error, yaml.constructor.ConstructorError) else " is not YAML"
        raise KepoConfigError(f"{path}{kind}: {_words_of(error)}") from error
    except RecursionError:
        raise KepoConfigError(f"{path} is not YAML: nested too deeply") from None
    if content is None or content == "":
        raise KepoConfigError(f"{path} is empty; expected `key: value` lines")
    if not isinstance(content, dict):
        kinds: dict[type, str] = {list: "a list", str: "one text", Word: "one word"}
        kind = kinds.get(type(content), "no mapping")
        raise KepoConfigError(f"{path} holds {kind}; expected `key: value` lines")
    return content


def _text(path: Path, otherwise: str) -> str:
    """Return the text of the file, in UTF-8, or in UTF-16 that says so in its first bytes."""
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise KepoConfigError(f"{path} is a folder; name the file in it")
        if not stat.S_ISREG(about.st_mode):  # to open a pipe would be to wait for its other end
            raise KepoConfigError(f"{path} is no regular file; expected a YAML file")
        if about.st_size > LARGEST:
            raise KepoConfigError(f"{path} has {about.st_size} bytes; expected a few lines of YAML")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, KepoConfigError):
            raise
        said = error.strerror if isinstance(error, OSError) else error
        raise KepoConfigError(
            f"{path} cannot be read: {said}; expected a YAML file or {otherwise}"
        ) from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise KepoConfigError(
            f"{path} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _words_of(error: Exception) -> str:
    """Return a YAML error on one line: where, and what."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error)
    if "'\\t'" in problem:
        problem += "; indent by spaces, not tabs"
    return where + " ".join(problem.split())


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """A SafeLoader that leaves words as they are, and takes no key twice."""

        # Of YAML 1.1's guesses at types only the merge key: `1:30` is no 90, `010` no 8.
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, regexp) for tag, regexp in found if tag == "tag:yaml.org,2002:merge"]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in seen:
                    problem = (
                        f"the key {key.value!r} is already in line {seen[key.value]}; keep one"
                    )
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = line
            return node

    def word(loader: Any, node: Any) -> str:
        text = loader.construct_scalar(node)
        return Word(text) if node.style is None else text

    Loader.add_constructor("tag:yaml.org,2002:str", word)
    return Loader
