"""What is asked of a server before a run: is it there, is its tokenizer the student's, does it say
as much as is wanted, and does its model still have its weights.

A server whose weights were lost, say when it woke from sleep, answers as readily as any other: its
law is the same for every token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import ImageOps

from kepo.data.images import open_rgb
from kepo.errors import KepoConfigError, KepoTeacherError
from kepo.models.encoding import Prompt
from kepo.sections import TeacherConfig
from kepo.teachers.said import Said
from kepo.teachers.served import SGLANG, ServedTeacher, messages_of, url_of
from kepo.teachers.transport import Refused, Server

SENTENCE = "The quick brown fox jumps over the lazy dog: 3 + 5 = 8, so the answer is B."
SAMPLED = 512
"""The number of tokens, from all over the vocabulary, in the text that both sides tokenise."""
MISSING = (404, 405, 501)
"""HTTP codes of a path that a server does not have."""


class Offer(NamedTuple):
    """What a server says that it offers."""

    model: str
    """The name of its model."""
    positions: int | None
    """The number of tokens that a prompt and what follows may have; None if it does not say."""
    make: str = "vllm"
    """Whose server it is, as far as that matters: vllm or sglang."""


def offer_of(server: Server, config: TeacherConfig) -> Offer:
    """Return what a server offers: ``teacher_model``, or else its only model.

    Raises KepoConfigError if it offers another, or several; KepoTeacherError if it does not answer.
    """
    which, url, wanted = server.which, server.url, config.teacher_model
    try:
        answer = server.ask("/v1/models")
    except Refused as error:
        if error.code not in MISSING or wanted is None:
            raise
        return Offer(str(wanted), None)  # it keeps no list
    listed = answer.get("data") if isinstance(answer, dict) else None
    found = {one.get("id"): one for one in listed or () if isinstance(one, dict)}
    if wanted is None and len(found) != 1:
        raise KepoConfigError(
            f"teacher_model is not set, and {which}={url!r} offers {len(found)} models"
            f"{': ' if found else ''}{', '.join(map(str, found))}; expected the name of one"
        )
    name = str(wanted or next(iter(found)))
    if name not in found:
        raise KepoConfigError(
            f"teacher_model={name!r}: {which}={url!r} offers {', '.join(map(str, found)) or 'none'}"
        )
    length = found[name].get("max_model_len")
    # One token always follows: a server must generate something.
    make = SGLANG if found[name].get("owned_by") == SGLANG else "vllm"
    return Offer(name, length - 1 if isinstance(length, int) else None, make)


def check_tokenizer(teacher: ServedTeacher) -> str | None:
    """Check that the server tokenises a long known text as the student does; returns a sentence
    where its chat template is another, or cannot be asked."""
    tokenizer, which, url = teacher.encoder.tokenizer, teacher.server.which, teacher.server.url
    text = known_text(tokenizer)
    mine = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked: dict[str, Any] = dict(model=teacher.model, add_special_tokens=False)
    try:
        theirs = _tokens(teacher, asked | dict(prompt=text))
    except Refused as error:
        if error.code not in MISSING:
            raise
        return f"{which}={url!r} has no /tokenize: only the ids it returns are compared"
    if theirs != mine:
        place = next(n for n, (a, b) in enumerate(_pairs(mine, theirs)) if a != b)
        ids = [row[place] if place < len(row) else None for row in (mine, theirs)]
        raise KepoTeacherError(
            f"{which}={url!r} has another tokenizer than the student: of a known text of "
            f"{len(mine)} tokens number {place} is {ids[0]} for the student and {ids[1]} for it; "
            "distillation needs models that share a tokenizer"
        )
    prompt = Prompt("3 + 5?")
    [written] = teacher.encoder.chat_ids([prompt])
    try:
        same = _tokens(teacher, asked | dict(messages=messages_of(prompt))) == written
    except Refused:  # it tokenises texts alone
        same = True
    if not same:
        return (
            f"{which}={url!r} has another chat template than the student: it scores completions "
            "under the student's, and writes hints under its own"
        )
    return None


def known_text(tokenizer: Any) -> str:
    """Return a text with tokens from all over the vocabulary in it, and all that were added."""
    every = max(1, len(tokenizer) // SAMPLED)
    added = sorted(tokenizer.get_added_vocab())
    return " ".join([SENTENCE, tokenizer.decode(list(range(0, len(tokenizer), every))), *added])


def check_law(teacher: ServedTeacher, k: int) -> None:
    """Check that the server gives the log-probabilities of k tokens at each place of a known text,
    finite, and not those of a model that has lost its weights."""
    tokenizer = teacher.encoder.tokenizer
    first, *rest = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    try:
        teacher.law([first], rest, ())
    except Refused as error:
        if "logprobs" not in str(error):
            raise
        raise KepoConfigError(
            f"teacher_top_k={k} is more than the server gives: {error}; start vLLM with "
            f"--max-logprobs {k}, or set a smaller teacher_top_k"
        ) from error


def check_sight(teacher: ServedTeacher, prompt: Prompt) -> None:
    """Check that the server takes token ids together with pictures, and that what it says depends
    on them. prompt: a question with a picture."""
    which, url, encoder = teacher.server.which, teacher.server.url, teacher.encoder
    if teacher.make == SGLANG:
        raise KepoConfigError(
            f"{which}={url!r} is SGLang's, which takes no token ids with pictures: it makes text "
            "of them, and other ids of that; serve the teacher with vLLM"
        )
    if encoder.pictures is None or encoder.pictures.vllm is None:
        raise KepoConfigError(
            f"{which}={url!r} and pictures: it is not known whether a server reads this family's "
            "placeholders as the encoder writes them; use a local teacher, Qwen or InternVL"
        )
    tokens = encoder.tokenizer(" 3 + 5", add_special_tokens=False)["input_ids"]
    [ids] = encoder.chat_ids([prompt])
    pictures = [open_rgb(path) for path in prompt.images]
    shown = [partial(url_of, picture) for picture in pictures]
    others = [partial(url_of, ImageOps.invert(picture)) for picture in pictures]
    try:
        said = [teacher.law(ids, tokens, urls) for urls in (shown, others)]
    except Refused as error:
        if error.code not in MISSING:
            raise
        raise KepoTeacherError(
            f"{which}={url!r} takes no token ids with pictures ({error.code}); start vLLM 0.32 or "
            "later with --enable-scale-out"
        ) from error
    if _same(*said):
        raise KepoTeacherError(
            f"{which}={url!r} says the same of a text after two different pictures: it does not "
            "see them"
        )


def _same(one: Said, other: Said) -> bool:
    return torch.equal(one.logprobs, other.logprobs) and torch.equal(one.ids, other.ids)


def _tokens(teacher: ServedTeacher, body: dict[str, Any]) -> list[int]:
    answer = teacher.server.ask("/tokenize", body)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list):
        source = teacher.source
        raise KepoTeacherError(f"{source} answers /tokenize without tokens: {str(answer)[:200]}")
    return tokens


def _pairs(mine: Sequence[int], theirs: Sequence[int]) -> Any:
    return itertools.zip_longest(mine, theirs)
