"""How the text of a setting is read: the same in a YAML file, in a flag and, as values, in Python.

The setting's type decides. `1e-6` is a number where a number is expected; `1e3` also where a whole
number is; `None`, `null` and `~` are None where None is allowed; yes, no, on and off are booleans
where a boolean is expected, and text elsewhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

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
Pairs = tuple[tuple[str, str], ...]
"""The type of a setting that maps names to texts: a mapping in YAML, NAME=TEXT as a flag."""
EXACT = 2**53
"""Every whole number up to this one is represented exactly by a float."""


NAMES = {int: "a whole number", float: "a number", str: "text", bool: ""}
"""The types of settings in the words of errors; what a bool is, the advice says."""
SYNONYMS = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_steps": "steps",
    "output_dir": "run_dir",
    "model": "student",
    "model_name_or_path": "student",
    "ref_model": "teacher",
    "dataset": "train_data",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "epsilon": "epsilon_low",
    "kd_coef": "distill_coef",
    "lora_r": "lora_rank",
    "per_device_train_batch_size": "micro_batch",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
}
"""Names that other trainers have for settings, and ours."""


class Word(str):
    """Unquoted text, whose meaning the setting's type decides. A quoted text is a plain str."""

    def __repr__(self) -> str:
        known = self in NONE or self in BOOL or number(self) is not None
        return str(self) if known and self else super().__repr__()


LARGEST = 1e30
"""The largest bounded number. Ten times it, as AdamW computes with lr in its first step, is still
finite in float32."""


class Bound(NamedTuple):
    """A condition that a number must fulfil besides being finite; part of a field's annotation."""

    holds: Callable[[float], bool]
    expected: str


def typed(value: Any, hint: Any) -> Any:
    """Return ``value`` as a field annotated ``hint`` holds it: str, int, float, bool or a Literal,
    a tuple[..., ...] of one of them, or one of all these `| None`. Numbers may have a ``Bound``.

    Lists become tuples; whole numbers become floats where floats are expected, and the other way
    round; numpy scalars and paths are accepted too. Raises a ValueError that says what was
    expected.
    """
    kind, bound, optional = parts_of(hint)
    if optional and (value is None or (isinstance(value, Word) and value in NONE)):
        return None
    if kind == Pairs:
        return _pairs(value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        try:
            return tuple(typed(one, get_args(kind)[0]) for one in value)
        except ValueError as error:
            raise ValueError(f"a list, each of it {error}") from error
    try:
        found = _scalar(value, kind)
    except ValueError as error:
        raise ValueError(", ".join(filter(None, (_spelt(hint), str(error))))) from error
    if bound is not None and not math.isfinite(found):
        raise ValueError(f"{bound.expected}, and finite")
    if bound is not None and not bound.holds(found):
        raise ValueError(bound.expected)
    if bound is not None and abs(found) > LARGEST:
        raise ValueError(f"at most {LARGEST:g}, to stay finite in float32")
    return found


def _pairs(value: Any) -> Pairs:
    """Return the pairs of a mapping, of a list of them or of texts NAME=TEXT."""
    said = "a mapping, in YAML {name: text, other: text}"
    found = {}
    for one in value.items() if isinstance(value, Mapping) else value if _is_list(value) else [""]:
        pair = one.partition("=")[::2] if isinstance(one, str) else one
        if not (_is_list(pair) and len(pair) == 2 and all(pair)):
            raise ValueError(said)
        if not all(isinstance(x, (str, os.PathLike)) for x in pair):
            raise ValueError(said)
        name, text = map(os.fspath, pair)
        if name in found:
            raise ValueError(f"{said}, with {name} once")
        found[str(name)] = str(text)
    return tuple(found.items())


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def parts_of(hint: Any) -> tuple[Any, Bound | None, bool]:
    """Split an annotation into ``(the type itself, its bound, whether None is allowed)``."""
    bound = None
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
    return hint, bound, optional


def _spelt(hint: Any) -> str:
    """Return the annotation as error messages spell it."""
    kind, _, optional = parts_of(hint)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, ((None,) if optional else ()) + get_args(kind)))}"
    if get_args(kind):
        return f"a list of {_spelt(get_args(kind)[0])}{', or None' if optional else ''}"
    name = NAMES.get(kind, kind.__name__)
    return f"{name}, or None" if optional else name


def _scalar(value: Any, kind: Any) -> Any:
    """Convert like ``typed``, but the ValueError says only what to do, if anything."""
    if get_origin(kind) is tuple:
        raise ValueError("in YAML [one, two]")
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        found = value if isinstance(choices[0], str) else _scalar(value, type(choices[0]))
        if found in choices:
            return choices[choices.index(found)]
        raise ValueError
    if kind is str:
        return _text(value)
    if isinstance(value, Word):
        found = BOOL.get(str(value)) if kind is bool else number(value)
    elif kind is bool:
        found = value if isinstance(value, bool) else None
    else:
        found = value if _is_number(value) else None
    if found is not None:
        if kind is bool:
            return found
        if kind is float:
            return float(found)
        if isinstance(found, numbers.Integral):
            return int(found)
        if math.isfinite(found) and found == int(found) and abs(found) <= EXACT:
            return int(found)
    if isinstance(value, str) and not isinstance(value, Word) and _means(value, kind):
        raise ValueError("without quotes")
    raise ValueError("true or false" if kind is bool else "")


def _text(value: Any) -> str:
    if isinstance(value, Word):
        # `none` in small letters is a choice of several settings.
        if value in NONE - {"none"}:
            raise ValueError("which cannot be None; quote it if it is a name")
        if (
            value in ("true", "True", "TRUE", "false", "False", "FALSE")
            or number(value) is not None
        ):
            raise ValueError(f'quote it if it is a name: "{value}"')
        return str(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return str(value)
    raise ValueError("")


def _means(text: str, kind: type) -> bool:
    return text in BOOL if kind is bool else number(text) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(word: str) -> int | float | None:
    """Return the number that a word spells, or None if it is not a number."""
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
    """Return ``path`` with a leading ~ or ~user replaced by that home folder. Raises ValueError if
    there is no such folder, and for paths that would create a folder with a strange name."""
    if not path:
        raise ValueError("a path, not an empty one")
    if "\0" in path:
        raise ValueError("a path, without a NUL character")
    if found := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(
            f"a path written out: {found[0]} is not expanded here; as a flag the shell expands it"
        )
    if path in ("none", "None"):
        raise ValueError(f"a path, ./{path} if there is one of that name")
    home = os.path.expanduser(path)
    if path.startswith("~") and home == path:
        name = Path(path).parts[0]
        raise ValueError(f"a path, but {name} is no user's home folder; ./{path} if it is a name")
    return home


def at_home(record: Any, *names: str) -> Any:
    """Return the dataclass with the named fields ``expanded``; None stays None. Raises
    KepoConfigError."""
    found = {name: getattr(record, name) for name in names}
    for name, value in found.items():
        try:
            found[name] = None if value is None else expanded(typed(value, str))
        except ValueError as error:
            raise KepoConfigError(f"{name}={sentence(value, error)}") from error
    return dataclasses.replace(record, **found)


def is_address(name: str) -> bool:
    """Return whether a setting that may be a path is the address of a server."""
    return name.startswith(("http://", "https://"))


def sentence(value: Any, expected: ValueError) -> str:
    """Return a sentence that says what was given, what was expected and what to do."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return f"{short.repr(value)}; expected {expected}"


def guesses(name: str, known: Iterable[str]) -> str:
    """Return words that offer at most three of the known names for one that is not known."""
    known = list(known)
    meant = SYNONYMS.get(_plain(name))
    if here := [one for one in known if _plain(one) == meant]:
        return f"it is called {here[0]} here"
    if alike := difflib.get_close_matches(name, known, 3, 0.7):
        return f"did you mean {' or '.join(alike)}?"
    return f"the nearest are {', '.join(difflib.get_close_matches(name, known, 3, 0))}"


def _plain(name: str) -> str:
    return name.strip("-").replace("-", "_")
