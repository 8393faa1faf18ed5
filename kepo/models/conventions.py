"""The conventions of a model that its files state: how a turn ends, what text the template starts
an answer with, which tokens are no text.

They are read and obeyed. What cannot be obeyed is refused when the model is loaded, because later
it would show as rewards of 0 or as log-probabilities that are slightly wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo_kernels import KepoInputError, head_of

_TAG = re.compile(r"<(/?)([A-Za-z]\w*)>")
_MARKED = re.compile(r"<\|.+\|>")
_MARK = 'A question?\nA.  1 < 2 & "so"\nB. it\'s > é'  # stands in for what a turn says


def turn(role: str, text: str, images: int | None = None) -> dict[str, Any]:
    """Return a message for a chat template, its images before its text. images: None = the model
    sees none, and its template takes a text in place of a list of parts."""
    if images is None:
        return {"role": role, "content": text}
    shown = [{"type": "image"} for _ in range(images)]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def end_ids(path: str | Path, tokenizer: Any, config: Any, sees: bool) -> tuple[int, ...]:
    """Return every token that ends a completion, first the one that the template ends answers with.

    They are those of generation_config.json, or else of config.json, and the tokenizer's own.
    Raises KepoCheckpointError if generation_config.json is there and cannot be read, or if what is
    stated is not the id of a token: if it were ignored, completions would run on.
    """
    known = set(tokenizer.get_vocab().values())
    ends = [*_stated_ends(path, config, known), tokenizer.eos_token_id]
    closing = _closing_token(path, tokenizer, sees)
    if closing not in {*ends, *_special(tokenizer)}:
        closing = tokenizer.eos_token_id
    return tuple(dict.fromkeys([closing, *ends]))


def control_ids(tokenizer: Any, marks: set[int], ends: Iterable[int]) -> frozenset[int]:
    """Return the tokens that are no text: ends, padding, the marks of images, all that are written
    like ``<|im_start|>``, and all special tokens but tags. Tags (``<think>``) are part of an
    answer, whatever the tokenizer calls them."""
    added = tokenizer.added_tokens_decoder
    roles = {tokenizer.convert_tokens_to_ids(token) for token in _roles(tokenizer)} - {None}
    tags = {
        token
        for token, what in added.items()
        if _TAG.fullmatch(what.content) and token not in roles
    }
    marked = {token for token, what in added.items() if _MARKED.fullmatch(what.content)}
    return frozenset((_special(tokenizer) | roles | marked) - tags | set(ends) | marks)


def opened_by(path: str | Path, tokenizer: Any, sees: bool) -> str:
    """Return the text that the template starts an answer with: all from the first tag that it
    leaves open (``<think>\\n``); "" if it opens none."""
    question = turn("user", _MARK, 0 if sees else None)
    asked = _rendered(path, tokenizer, [question], add_generation_prompt=True)
    begun = asked.rpartition(_MARK)[2]
    left_open = _open_tags(begun)
    return begun[left_open[0].start() :] if left_open else ""


def closed(opened: str) -> str:
    """Return the tags that close those left open: ``</think>`` after ``<think>\n``."""
    return "".join(f"</{tag[2]}>" for tag in reversed(_open_tags(opened)))


def check_template(path: str | Path, tokenizer: Any, image_token_id: int | None) -> None:
    """Raise KepoCheckpointError if the chat template fails, leaves the question or its image out,
    changes its text, or depends on chance or on the date. None: the model sees no images."""
    question = turn("user", _MARK, None if image_token_id is None else 1)
    asked, again = (
        _rendered(path, tokenizer, [question], add_generation_prompt=True) for _ in range(2)
    )
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    images = 1 if image_token_id is None else ids.count(image_token_id)
    if image_token_id is None and _MARK not in asked:
        raise KepoCheckpointError(
            f"{path}: of a message with text the chat template makes no text as it was written; "
            "expected the text, unchanged (as |e and |upper do not leave it)"
        )
    if _MARK not in asked or images != 1:
        found = f"{images} image placeholders" if _MARK in asked else "no text as it was written"
        raise KepoCheckpointError(
            f"{path}: of a message with one image and text the chat template makes {found}; "
            "expected the text, unchanged (as |e and |upper do not leave it), and one placeholder "
            "(image_token_id of the config) per image"
        )
    if asked != again:
        raise KepoCheckpointError(
            f"{path}: the chat template makes two prompts of one message; expected the same at "
            "every call"
        )
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if any("strftime_now" in text for text in texts):
        raise KepoCheckpointError(
            f"{path}: the chat template writes the current date (strftime_now), so the same "
            "message gives another prompt on another day; write a fixed date into the template"
        )


def check_head(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Raise KepoCheckpointError for a tokenizer with ids beyond the head or the embedding, and for
    a head whose logits the losses cannot form (kepo_kernels.head_of)."""
    largest = max(tokenizer.get_vocab().values())
    head = model.get_output_embeddings()
    for name, module in (("head", head), ("embedding", model.get_input_embeddings())):
        rows = module.weight.shape[0]
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise KepoCheckpointError(
                f"{path}: the tokenizer has ids up to {largest} ({token!r}), the model's {name} "
                f"{rows} rows; expected a row for every token: call "
                "model.resize_token_embeddings(...) and save, or take the tokenizer it came with"
            )
    if largest >= len(tokenizer):
        raise KepoCheckpointError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and ids up to {largest}; "
            "expected ids without holes, as rows of the head beyond them are never sampled"
        )
    try:
        head_of(model)
    except KepoInputError as error:
        raise KepoCheckpointError(f"{path}: the model's head cannot be read: {error}") from error


def check_positions(path: str | Path, config: Any) -> None:
    """Raise KepoCheckpointError for positions whose meaning depends on how long the text has
    become: sampling, which reads a token at a time, and training would differ."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise KepoCheckpointError(
            f"{path}: rope_type={kind!r} turns positions by the length that a text has so far, "
            "so that what is sampled and what is trained on would differ; expected 'default', "
            "'linear', 'yarn' or 'llama3'"
        )


def check_padding(path: str | Path, config: Any) -> None:
    """Raise KepoCheckpointError for a padding token that is no row of the embedding, or counts from
    its end: the row that it names is never trained."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), text.vocab_size
    if pad is not None and (type(pad) is not int or not 0 <= pad < rows):
        raise KepoCheckpointError(
            f"{path}: config.json says pad_token_id={pad!r}; expected null or the id of a token, "
            f"a whole number from 0 to {rows - 1}"
        )


def check_same_opening(student: Any, teacher: Any) -> None:
    """Raise KepoConfigError if the templates of two encoders start answers with different texts: a
    completion of the one would be nonsense after the other's prompt."""
    if student.opened.strip() != teacher.opened.strip():
        raise KepoConfigError(
            f"student: its chat template opens an answer with {student.opened!r} and the "
            f"teacher's with {teacher.opened!r}; distillation compares what they say after the "
            "same words: give both the same chat_template"
        )


def without_dropout(model: Any) -> list[str]:
    """Set every dropout of a model to 0, in place; return what it was, by name.

    A forward that drops other units than the one that sampled gives other log-probabilities. The
    config keeps its values, and so does what is saved.
    """
    found = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.add(f"dropout={module.p}")
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                found.add(f"{name}={value}")
                setattr(module, name, 0.0)
    return sorted(found)


def _open_tags(text: str) -> list[re.Match]:
    left_open: list[re.Match] = []
    for tag in _TAG.finditer(text):
        if not tag[1]:
            left_open.append(tag)
        elif left_open and left_open[-1][2] == tag[2]:
            left_open.pop()
    return left_open


def _rendered(path: str | Path, tokenizer: Any, chat: list[dict[str, Any]], **settings: Any) -> str:
    """Render a chat with the template; KepoCheckpointError if it fails or asks for chance.

    Comparing two results might not reveal chance: two draws can be equal.
    """
    before = random.getstate()
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **settings)
    except Exception as error:  # a template is a program, and may fail in any way
        raise KepoCheckpointError(
            f"{path}: the chat template fails on a message with {_kinds(chat)}: {error}"
        ) from error
    if random.getstate() != before:
        random.setstate(before)
        raise KepoCheckpointError(
            f"{path}: the chat template draws at random (|random, lipsum), so the same "
            "message gives another prompt at every call; write a fixed text into the template"
        )
    return text


def _kinds(chat: list[dict[str, Any]]) -> str:
    return "text" if isinstance(chat[0]["content"], str) else "text and image"


def _closing_token(path: str | Path, tokenizer: Any, sees: bool) -> int | None:
    """Return the token that the template writes after an answer; None if it takes no answers."""
    images = 0 if sees else None
    answer = turn("assistant", _MARK, images)
    try:
        said = _rendered(path, tokenizer, [turn("user", "?", images), answer])
    except KepoCheckpointError:
        return None
    after = said.rpartition(_MARK)[2]
    return next(iter(tokenizer(after, add_special_tokens=False)["input_ids"]), None)


def _stated_ends(path: str | Path, config: Any, known: set[int]) -> list[int]:
    """Return the end tokens that generation_config.json states, or else config.json."""
    from transformers import GenerationConfig

    file = Path(path) / "generation_config.json"
    try:
        return _ids_in(file, GenerationConfig.from_pretrained(path).eos_token_id, known)
    except KepoCheckpointError:
        raise
    except Exception as error:
        if file.exists():
            raise KepoCheckpointError(f"{file} cannot be read: {error}") from error
    file = Path(path) / "config.json"
    found = getattr(config, "eos_token_id", None)
    if found is not None:
        return _ids_in(file, found, known)
    text = config.get_text_config()
    found = getattr(text, "eos_token_id", None)
    if found == getattr(type(text)(), "eos_token_id", None) and found not in known:
        return []  # the default of its class, which nobody has stated
    return _ids_in(file, found, known)


def _ids_in(file: Path, given: Any, known: set[int]) -> list[int]:
    """Return the end tokens as a list; KepoCheckpointError if one is not the id of a token."""
    if given is None:
        return []
    several = list(given) if isinstance(given, list | tuple) else [given]
    if any(type(token) is not int or token not in known for token in several):
        raise KepoCheckpointError(
            f"{file} says eos_token_id={given!r}; expected the id of a token, a whole "
            f"number from 0 to {max(known)}, or a list of such"
        )
    return several


def _special(tokenizer: Any) -> set[int]:
    return {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}


def _roles(tokenizer: Any) -> list[str]:
    """Return the tokens that the tokenizer names for a purpose: beginning, end, padding and
    others."""
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    found = (getattr(tokenizer, f"{name}_token", None) for name in names)
    return [token for token in found if token]
