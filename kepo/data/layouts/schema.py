r"""The record that JSON Lines, Parquet and datasets have in common.

    {"question": "What is it?", "options": ["CT", "X-ray"], "answer": "B", "image": "a.png"}
    {"prompt": [{"role": "user", "content": "What is 6 * 7?"}], "solution": "... \\boxed{42}"}

Required are ``prompt`` (text or turns), ``messages`` or ``question``, and ``answer``, ``solution``
or a last turn of the assistant. Optional are ``image`` or ``images``, ``options``, ``question_id``
or ``id``, ``modality_type`` or ``modality``, ``question_type``, ``rationale``. A field of null
counts as left out. All that is not read here is kept in ``Example.columns``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from kepo.data.characters import letter_of, unmarked
from kepo.data.example import LETTERS, UNKNOWN, Example
from kepo.data.layouts.messages import Asked, asked
from kepo.data.records import (
    BadRecord,
    Parsed,
    Sources,
    fields_of,
    one_line,
    plain,
    require_untold,
    require_visible,
    right_letter,
    shown,
    text,
)
from kepo.data.solutions import final_answer

ASKS = ("prompt", "messages", "question")
"""The fields of which a record needs one."""
IMAGES = ("image", "images")
OWN = frozenset(
    ("question", *IMAGES, "options", "question_id", "id", "modality_type", "modality")
    + ("question_type", "rationale")
)
"""The fields that an Example holds itself; all others are its columns."""
TAKEN = frozenset(("prompts", "completions", "completion_ids", "earlier"))
"""What rewards are given by these names is of the run, not of the record."""
READ = OWN | {"prompt", "messages", "answer", "solution"}


def with_id(record: Any, made: str) -> Any:
    """Return the record with an id made from its place, if it has none of its own."""
    if isinstance(record, dict) and record.get("question_id") is None and record.get("id") is None:
        return record | {"question_id": made}
    return record


def parse(record: Any, where: str) -> Parsed:
    record = fields_of(record)
    given = {key: value for key, value in record.items() if value is not None}
    said = asked(given)
    options = _options(given.get("options"))
    if options:
        require_untold(said.question, options)
    answer, rationale = _answer(given, said, options)
    example = Example(
        id=_name(given, "question_id" if "question_id" in given else "id"),
        question=said.question,
        options=options,
        answer=answer,
        images=(),
        modality=_optional(given, "modality_type", "modality"),
        question_type=_optional(given, "question_type"),
        rationale=rationale,
        earlier=said.earlier,
        columns={key: value for key, value in record.items() if key not in OWN},
    )
    return example, _sources(given, said)


def quirks(record: dict[str, Any], example: Example) -> list[str]:
    """Return what is odd about a good record, and perhaps not meant."""
    found = []
    if "<image>" in example.question:
        found.append("<image> in the question, which is read as text")
    found += [
        f"a column called {name}, which rewards are given as something else; rename it"
        for name in sorted(TAKEN & {*example.columns})
    ]
    value = record.get("solution") if record.get("answer") is None else record["answer"]
    if example.options and type(value) is int and str(value) not in map(plain, example.options):
        found.append("an answer by its place among the options, of which the first is 0")
    if not example.options and "\n" in example.answer.strip():
        found.append("an open answer of several lines: no final answer is marked in it")
    return found


def _options(value: Any) -> tuple[str, ...]:
    """Return the texts of a list, or of an object by letter; () if there are none."""
    if isinstance(value, Mapping):
        value = {str(key): option for key, option in value.items() if option is not None}
        if sorted(value) != list(LETTERS[: len(value)]):
            raise BadRecord(
                "options",
                f"options have the letters {shown(sorted(value))}; expected A, B and so on, "
                "without gaps",
            )
        value = [value[letter] for letter in sorted(value)]
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise BadRecord(
            "options",
            f"options={shown(value)}; expected a list of 2 to {len(LETTERS)} texts, or an object "
            "of them by letter",
        )
    pairs = zip(LETTERS, value, strict=False)
    return tuple(_words(option, f"option {letter}", "options") for letter, option in pairs)


def _answer(given: dict[str, Any], said: Asked, options: tuple[str, ...]) -> tuple[str, str]:
    """Return ``(answer, worked solution)``: a letter if there are options."""
    solutions = [
        _answer_words(given[key], key, options) for key in ("answer", "solution") if key in given
    ]
    if said.reply is not None:
        solutions.append(said.reply)
    if not solutions:
        raise BadRecord("answer", "has neither answer nor solution, nor a reply; expected one")
    answer, reasoning = final_answer(solutions[0])
    answers = {plain(words) for words in (answer, *options)}
    for other in solutions[1:]:
        marked, before = final_answer(other)
        # A solution that marks no answer is reasoning from end to end, or the answer once more.
        whole = (
            marked == other.strip()
            and not letter_of(unmarked(marked))
            and plain(marked) not in answers
        )
        reasoning = reasoning or before or (marked if whole else "")
    if "rationale" in given:
        reasoning = text(given, "rationale")
    require_visible("answer", answer, "answer")
    if not options:
        return answer, reasoning
    first = given.get("answer", given.get("solution"))
    return right_letter(first if type(first) is int else answer, options), reasoning


def _answer_words(value: Any, name: str, options: tuple[str, ...]) -> str:
    """Return an answer as text: yes or no for true or false, unless options are called so."""
    if not isinstance(value, bool):
        return _words(value, name, "answer")
    word = str(value).casefold()
    return word if word in map(plain, options) else "yes" if value else "no"


def _words(value: Any, name: str, kind: str) -> str:
    """Return a text, or a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return text({name: value}, name, kind)


def _name(given: dict[str, Any], key: str) -> str:
    if type(given.get(key)) is int:
        return str(given[key])
    return one_line(given, key)


def _optional(given: dict[str, Any], *keys: str) -> str:
    return next((one_line(given, key) for key in keys if key in given), UNKNOWN)


# ---- pictures ----


def stored(image: Any) -> str | bytes:
    """Return the path or the bytes of one picture, however a dataset stores it; "" for neither."""
    if isinstance(image, dict) and {*image} & {"bytes", "path"}:
        image = image.get("bytes") or image.get("path")
    if image is None or (isinstance(image, str) and not image):
        return ""
    if isinstance(image, bytes):
        return image
    return text({"image": image}, "image")


def _sources(given: dict[str, Any], said: Asked) -> Sources:
    """Return the pictures of the fields, or those in the question's turn."""
    names = [name for name in IMAGES if name in given]
    if len(names) > 1:
        raise BadRecord("field", "has both image and images; expected one of them")
    inside = [source for source in said.images if source is not None]
    places = len(said.images)
    if inside and (names or len(inside) < places):
        raise BadRecord(
            "field", "has pictures in the turn and places for others; expected one of both"
        )
    if inside:
        return tuple(stored(source) for source in inside)
    value = given[names[0]] if names else []
    if callable(value):
        return partial(_fetched, value, places)
    if names == ["image"]:
        value = [value]
    if not isinstance(value, list):
        raise BadRecord("field", f"images={shown(value)}; expected a list")
    return _as_many(tuple(stored(image) for image in value), places)


def _fetched(images: Callable[[], Sequence[str | bytes]], places: int) -> Sequence[str | bytes]:
    return _as_many(images(), places)


def _as_many(images: Sequence[str | bytes], places: int) -> Sequence[str | bytes]:
    if places and places != len(images):
        raise BadRecord(
            "field",
            f"has {len(images)} images, and places for {places} in its turn; expected one each",
        )
    return images
