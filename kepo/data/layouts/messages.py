"""Conversations as records have them: turns of system, user and assistant, the question the last.

    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is it?"}]

A turn's content is a text, or a list of parts: texts, and pictures by path or as places that the
record's own list of images fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kepo.data.records import BadRecord, shown, text

ROLES = ("system", "user", "assistant")
_PICTURES = ("image", "path", "url", "image_url")


@dataclass(frozen=True)
class Asked:
    """What a record asks, as its text or its last user turn says it."""

    question: str
    earlier: tuple[tuple[str, str], ...] = ()
    """The turns before the question, (role, text) each."""
    reply: str | None = None
    """The turn of the assistant after the question."""
    images: tuple[Any, ...] = ()
    """The pictures in the question's turn; None is a place for one of the record's images."""


def asked(record: dict[str, Any]) -> Asked:
    """Return what the first of ``prompt``, ``messages``, ``question`` in a record asks.

    Raises BadRecord if there is none, or if it is no conversation that ends with a question.
    """
    key = next((key for key in ("prompt", "messages", "question") if key in record), None)
    if key is None:
        raise BadRecord(
            "field",
            f"has the fields {shown(sorted(record))}; expected question, prompt or messages",
        )
    if key == "question" or (key == "prompt" and isinstance(record[key], str)):
        return Asked(text(record, key))
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadRecord("field", f"{key}={shown(turns)}; expected a list of turns")
    read = [_turn(turn, f"{key}[{place}]") for place, turn in enumerate(turns)]
    reply = read.pop() if read[-1][0] == "assistant" else None
    if not read or read[-1][0] != "user":
        raise BadRecord(
            "field",
            f"{key} has the roles {[role for role, _, _ in read]}"
            f"{' before the reply' if reply else ''}; expected the last to be user, the question",
        )
    *before, (_, question, images) = read
    roles = [role for role, _, _ in before]
    if "system" in roles[1:]:
        raise BadRecord("field", f"{key} has the roles {roles}; expected system first, or not")
    if (reply and reply[2]) or any(pictures for _, _, pictures in before):
        raise BadRecord(
            "field", f"{key} has a picture in another turn; expected all in the last user turn"
        )
    earlier = tuple((role, words) for role, words, _ in before)
    return Asked(question, earlier, reply[1] if reply else None, images)


def _turn(turn: Any, name: str) -> tuple[str, str, tuple[Any, ...]]:
    """Return ``(role, text, pictures)`` of one turn."""
    if isinstance(turn, BadRecord):
        raise turn
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise BadRecord(
            "field", f"{name}={shown(turn)}; expected role ({', '.join(ROLES)}) and content"
        )
    content = turn.get("content")
    if isinstance(content, str):
        return turn["role"], text({name: content}, name), ()
    if not isinstance(content, list):
        raise BadRecord("field", f"{name}: content={shown(content)}; expected text or a list")
    words: list[str] = []
    pictures: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in ("image", "image_url"):
            given = (part.get(key) for key in _PICTURES)
            source = next((value for value in given if value is not None), None)
            if isinstance(source, dict) and "url" in source:
                source = source["url"]
            pictures.append(source)
        else:
            raise BadRecord(
                "field", f"{name} has the part {shown(part)}; expected one of type text or image"
            )
    return turn["role"], text({name: "".join(words)}, name), tuple(pictures)
