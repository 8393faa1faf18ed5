"""The help page of a command: its description and its flags, wrapped to the terminal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from kepo.words import Pairs, parts_of

NARROWEST, WIDEST = 50, 100
COLUMN = 26
"""The column at which the texts of flags begin."""


class Flag(NamedTuple):
    """A field of a dataclass on the command line."""

    name: str
    hint: Any
    default: Any
    """dataclasses.MISSING makes it a positional argument, which must be given."""
    section: type
    """The class that declares the field."""

    @property
    def positional(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def word(self) -> str:
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def heading(self) -> str:
        return self.section.__name__.removesuffix("Config")

    @property
    def switch(self) -> bool:
        return self.hint is bool

    @property
    def several(self) -> bool:
        return get_origin(parts_of(self.hint)[0]) is tuple

    @property
    def kind(self) -> Any:
        """The type of its value, or of each of its values."""
        kind = parts_of(self.hint)[0]
        return parts_of(get_args(kind)[0])[0] if self.several else kind

    @property
    def optional(self) -> bool:
        return parts_of(self.hint)[2]

    @property
    def values(self) -> str:
        """What may follow the flag, e.g. ``INT`` or ``{copy,fsdp2,offload}``."""
        if parts_of(self.hint)[0] == Pairs:
            name = "NAME=TEXT"
        elif get_origin(self.kind) is Literal:
            name = f"{{{','.join(map(str, get_args(self.kind)))}}}"
        else:
            name = self.kind.__name__.upper()
        return "None|" * self.optional + name + " ..." * self.several


def flags_of(record: Any) -> list[Flag]:
    """Return the fields of a dataclass, or of an instance, whose values are the defaults then."""
    kind = record if isinstance(record, type) else type(record)
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        default = field.default if record is kind else getattr(record, field.name)
        declares = (one for one in kind.__mro__ if field.name in inspect.get_annotations(one))
        found.append(Flag(field.name, hints[field.name], default, next(declares)))
    return found


def about(words: Sequence[str], flags: list[Flag]) -> list[Flag]:
    """Return the flags of the sections that words name, and those with a word in their names."""
    wanted = [word.strip("-").replace("-", "_").lower() for word in words]
    return [
        flag
        for flag in flags
        if any(word and (word in flag.name or word == flag.heading.lower()) for word in wanted)
    ]


def page(usage: str, description: str, flags: list[Flag]) -> str:
    """Return the help page: usage, description, and the flags under their sections' headings."""
    width = max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))
    told = [_paragraph(text, width) for text in description.split("\n\n") if text]
    blocks = [f"usage: {usage}", *told]
    positional = [flag for flag in flags if flag.positional]
    if positional:
        blocks.append("\n".join(["Arguments:", *(_entry(flag, width) for flag in positional)]))
    options = [flag for flag in flags if not flag.positional]
    names = list(dict.fromkeys(flag.heading for flag in options))
    alone = len(names) == 1
    if told and len(names) > 1:
        one = (
            f"--help {names[0].lower()}, or --help and a part of options' names, prints only those"
        )
        blocks.append(_paragraph(f"Sections: {', '.join(names)}. {one}.", width))
    for name in names:
        members = [flag for flag in options if flag.heading == name]
        heading = f"{'Options' if told and alone else name}: {inspect.getdoc(members[0].section)}"
        entries = [_entry(flag, width) for flag in members]
        blocks.append("\n".join([_paragraph(heading.partition("\n\n")[0], width), *entries]))
    return "\n\n".join([*blocks, f"  {'-h, --help':{COLUMN - 2}}Print this page."])


def _paragraph(text: str, width: int) -> str:
    """Return the text in lines of ``width``; an indented text, an example, stays as it is."""
    text = text.strip("\n")
    return text if text.startswith("    ") else textwrap.fill(" ".join(text.split()), width)


def _entry(flag: Flag, width: int) -> str:
    text = _documentation(flag.section)[flag.name]
    if flag.positional:
        invocation = flag.word
    else:
        text += f" (default: {_shown(flag.default)})"
        no = f"{flag.word}, --no-{flag.word[2:]}"
        invocation = no if flag.switch else f"{flag.word} {flag.values}"
    lines = textwrap.wrap(text, width - COLUMN)
    if len(invocation) > COLUMN - 4:
        lines.insert(0, "")
    first, *others = lines
    return "\n".join(
        [f"  {invocation:{COLUMN - 2}}{first}".rstrip(), *(" " * COLUMN + line for line in others)]
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join("=".join(x) if isinstance(x, tuple) else str(x) for x in value) or "not set"
    return "not set" if value == "" else str(value)


@cache
def _documentation(kind: type) -> dict[str, str]:
    """Return the docstring under each field that a class declares, as one paragraph."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found
