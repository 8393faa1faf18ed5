"""What the words of a setting mean: the same in a YAML file, in a flag and, as values, in Python.

The setting's type decides. `1e-6` is a number where a number is wanted, `1e3` also where a whole
one is; `None`, `null` and `~` are None where None is allowed; yes, no, on and off are booleans
where one is wanted, and text elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from kepo.errors import KepoConfigError

NULL = frozenset(("", "~", "null", "Null", "NULL"))  # YAML's
NONE = NULL | {"none", "None", "NONE"}
BOOL = {
    spelt: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for spelt in (word, word.capitalize(), word.upper())
}
# YAML 1.2's numbers, and digits in groups (1_000); ASCII's digits only.
INT = re.compile(r"[-+]?[0-9][0-9_]*")
BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)")
EXACT = 2**53
"""Up to here every whole number is a float of its own."""


class Word(str):
    """Text without quotes, whose meaning the setting's type decides. A quoted text is a str."""

    def __repr__(self) -> str:
        known = self in NONE or self in BOOL or _number(self) is not None
        return str(self) if known and self else super().__repr__()


def typed(value: Any, wanted: str) -> Any:
    """``value`` as a field annotated ``wanted`` holds it: str, int, float or bool, a
    tuple[..., ...] of one of them, or one of all these `| None`.

    Lists become tuples, whole numbers floats where these are wanted, and the other way round;
    numpy's scalars and paths are taken too. Raises ValueError, which says what to do.
    """
    plain = wanted.removesuffix(" | None")
    optional = plain != wanted
    if optional and (value is None or (isinstance(value, Word) and value in NONE)):
        return None
    if plain.startswith("tuple["):
        element = plain.removeprefix("tuple[").removesuffix(", ...]")
        if not isinstance(value, (list, tuple)):
            raise ValueError("a list, in YAML [one, two]")
        return tuple(_scalar(one, element) for one in value)
    return _scalar(value, plain)


def _scalar(value: Any, plain: str) -> Any:
    if plain == "str":
        return _text(value)
    if isinstance(value, Word):
        found = BOOL.get(str(value)) if plain == "bool" else _number(value)
    elif plain == "bool":
        found = value if isinstance(value, bool) else None
    else:
        found = value if _is_number(value) else None
    if found is not None:
        if plain == "bool":
            return found
        if plain == "float":
            return float(found)
        if isinstance(found, numbers.Integral):
            return int(found)
        if math.isfinite(found) and found == int(found) and abs(found) <= EXACT:
            return int(found)
    if isinstance(value, str) and not isinstance(value, Word) and _means(value, plain):
        raise ValueError("without quotes")
    raise ValueError("true or false" if plain == "bool" else "")


def _text(value: Any) -> str:
    if isinstance(value, Word):
        # `none` in small letters is a choice of several settings.
        if value in NONE - {"none"}:
            raise ValueError("which cannot be None; quote it if it is a name")
        if (
            value in ("true", "True", "TRUE", "false", "False", "FALSE")
            or _number(value) is not None
        ):
            raise ValueError(f'quote it if it is a name: "{value}"')
        return str(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return str(value)
    raise ValueError("")


def _means(text: str, plain: str) -> bool:
    return text in BOOL if plain == "bool" else _number(text) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(word: str) -> int | float | None:
    """The number that a word is, None if it is none."""
    text = str(word)
    if BASED.fullmatch(text):
        return int(text, 0)
    if INT.fullmatch(text) and len(text) <= 300:  # more is no setting, and slow to read
        return int(text.replace("_", ""))
    if FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return None


def expanded(path: str) -> str:
    """``path`` with a leading ~ or ~user replaced by that home folder. Raises ValueError where
    there is none, and for what would make a folder of a strange name."""
    if not path:
        raise ValueError("not an empty one")
    if "\0" in path:
        raise ValueError("without a NUL character")
    if found := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(
            f"written out: {found[0]} is not expanded here; as a flag the shell expands it"
        )
    if path in ("none", "None"):
        raise ValueError(f"./{path} if there is one of that name")
    home = os.path.expanduser(path)
    if path.startswith("~") and home == path:
        name = Path(path).parts[0]
        raise ValueError(f"but {name} is no user's home folder; ./{path} if it is a name")
    return home


def at_home(record: Any, *names: str) -> Any:
    """The dataclass with those fields ``expanded``; None stays. Raises KepoConfigError."""
    found = {name: getattr(record, name) for name in names}
    for name, value in found.items():
        try:
            found[name] = None if value is None else expanded(_text(value))
        except ValueError as error:
            raise KepoConfigError(f"{name}={sentence(value, 'a path', error)}") from error
    return dataclasses.replace(record, **found)


# ---- flags ----


def command_line(kind: Any, **settings: Any) -> Any:
    """``tyro.cli``, with the words of flags read as those of a YAML file are."""
    import tyro

    return tyro.cli(kind, registry=_registry(), **settings)


@cache
def _registry() -> Any:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    names = {int: "int", float: "float", int | None: "int | None", float | None: "float | None"}
    names[str | None] = "str | None"
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def scalar(info: Any) -> Any:
        wanted = names.get(info.type)
        if wanted is None:
            return None
        plain = wanted.removesuffix(" | None")
        optional = plain != wanted

        def read(words: list[str]) -> Any:
            # A flag's text needs no quotes, and an empty one was meant.
            if plain == "str":
                return None if words[0] in NONE - {""} else words[0]
            try:
                return typed(Word(words[0]), wanted)
            except ValueError as error:
                raise ValueError(sentence(words[0], wanted, error)) from error

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=("{None}|" if optional else "") + plain.upper(),
            instance_from_str=read,
            is_instance=lambda value: _holds(value, wanted),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def names_or_none(info: Any) -> Any:
        if info.type != tuple[str, ...] | None:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="{None}|STR [STR ...]",
            instance_from_str=lambda words: (
                None if len(words) == 1 and words[0] in NONE - {""} else tuple(words)
            ),
            is_instance=lambda value: _holds(value, "tuple[str, ...] | None"),
            str_from_instance=lambda value: ["None"] if value is None else list(value),
        )

    return registry


def _holds(value: Any, wanted: str) -> bool:
    try:
        typed(value, wanted)
    except ValueError:
        return False
    return True


def sentence(value: Any, wanted: str, error: ValueError) -> str:
    """What came, what was wanted, and what to do."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    shown = short.repr(value)
    return f"{shown}; expected {wanted}{f', {error}' if str(error) else ''}"
