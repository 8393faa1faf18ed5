"""The command line: flags of dataclasses' fields, read as a YAML file's values are."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from kepo.errors import KepoConfigError
from kepo.help import Flag, about, flags_of, page
from kepo.words import NONE, Word, guesses, number, sentence, typed


def command_line(
    *records: Any,
    prog: str,
    description: str,
    usage: str = "[OPTIONS]",
    args: Sequence[str] | None = None,
) -> list[Any]:
    """Return the dataclasses ``records`` with the values that the flags give.

    A record is an instance, whose values are the defaults, or a class. Prints the help page, which
    has ``description``, and ends the process where --help is given, which prints only what is
    ``about`` the words after it; ends it with code 2 and one
    sentence where flags or values are wrong. args: None means the process's own arguments.
    """
    words = list(sys.argv[1:] if args is None else args)
    usage = f"{prog} {usage}"
    flags = [flag for record in records for flag in flags_of(record)]
    if helps := [place for place, word in enumerate(words) if word in ("-h", "--help")]:
        asked = list(itertools.takewhile(lambda word: not _is_flag(word), words[helps[0] + 1 :]))
        if asked and not (some := about(asked, flags)):
            refuse(
                f"--help {' '.join(asked)}: no section of {prog} is called that, and no option has "
                "it in its name"
            )
        print(page(usage, "", some) if asked else page(usage, description, flags))
        sys.exit(0)
    given = _given(flags, words, prog, usage)
    try:
        return [_filled(record, given) for record in records]
    except KepoConfigError as error:
        refuse(str(error).removeprefix("Config: "))


def refuse(message: str) -> NoReturn:
    """End the process because of a wrong command line: one sentence, and code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _filled(record: Any, given: Mapping[str, Any]) -> Any:
    own = {field.name for field in dataclasses.fields(record)}
    values = {name: value for name, value in given.items() if name in own}
    return record(**values) if isinstance(record, type) else dataclasses.replace(record, **values)


def _given(flags: Sequence[Flag], words: Sequence[str], prog: str, usage: str) -> dict[str, Any]:
    """Return the values that the words give, by the fields' names."""
    named = {flag.word: flag for flag in flags if not flag.positional}
    off = {f"--no-{flag.word[2:]}": flag for flag in flags if flag.switch}
    places = deque(flag for flag in flags if flag.positional)
    found: dict[str, Any] = {}
    rest = deque(words)
    while rest:
        word, mark, value = rest.popleft().partition("=")
        name = word.replace("_", "-")
        if not _is_flag(word):
            if not places:
                refuse(f"{word + mark + value!r} is out of place; expected {usage}, flags last")
            flag = places.popleft()
            found[flag.name] = _value(flag, [word + mark + value])
        elif name in off or (name in named and named[name].switch):
            if mark:
                refuse(f"{word} takes no value; {name} and its opposite are switches")
            found[(off | named)[name].name] = name not in off
        elif name in named:
            flag, values = named[name], [value] if mark else []
            while not mark and rest and not _is_flag(rest[0]) and (flag.several or not values):
                values.append(rest.popleft())
            if not values:
                refuse(f"{word} has no value; expected {word} {flag.values}")
            found[flag.name] = _value(flag, values)
        else:
            near = guesses(name, [*named, *off])
            refuse(f"{word} is not an option of {prog}; {near} ({prog} --help)")
    if places:
        missing = " and ".join(flag.word for flag in places)
        refuse(f"{missing} not given; expected {usage}")
    return found


def _is_flag(word: str) -> bool:
    """Return whether a word names an option. A negative number is a value."""
    return word.startswith("-") and len(word) > 1 and number(word) is None


def _value(flag: Flag, words: list[str]) -> Any:
    """Return the value that the words of a flag mean; they need no quotes, so a text is as it is
    written, and an empty one was meant."""
    if flag.optional and len(words) == 1 and words[0] in NONE - {""}:
        return None
    if flag.kind is str:
        return tuple(words) if flag.several else words[0]
    unquoted = [Word(word) for word in words]
    try:
        return typed(unquoted if flag.several else unquoted[0], flag.hint)
    except ValueError as error:
        refuse(f"{flag.word}={sentence(Word(' '.join(words)), error)}")
