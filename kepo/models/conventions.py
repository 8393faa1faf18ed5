"""The conventions of a model that its files state: how a turn ends, what text the template starts
an answer with, which tokens are no text.

They are read and obeyed. What cannot be obeyed is refused when the model is loaded, because later
it would show as rewards of 0 or as log-probabilities that are slightly wrong.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from kepo.errors import KepoCheckpointError, KepoConfigError

VISION_TOKENS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""Names in a model's config of the tokens that stand for images and videos, or enclose them."""
_TAG = re.compile(r"<(/?)([A-Za-z]\w*)>")
_MARKED = re.compile(r"<\|.+\|>")
_MARK = 'A question?\nA.  1 < 2 & "so"\nB. it\'s > é'  # stands in for what a turn says


def end_ids(path: str | Path, tokenizer: Any, config: Any) -> tuple[int, ...]:
    """Return every token that ends a completion, first the one that the template ends answers with.

    They are those of generation_config.json, or else of config.json, and the tokenizer's own.
    Raises KepoCheckpointError if generation_config.json is there and cannot be read, or if what is
    stated is not the id of a token: if it were ignored, completions would run on.
    """
    known = set(tokenizer.get_vocab().values())
    ends = [*_stated_ends(path, config, known), tokenizer.eos_token_id]
    closing = _closing_token(path, tokenizer)
    if closing not in {*ends, *_special(tokenizer)}:
        closing = tokenizer.eos_token_id
    return tuple(dict.fromkeys([closing, *ends]))


def control_ids(tokenizer: Any, config: Any, ends: Iterable[int]) -> frozenset[int]:
    """Return the tokens that are no text: ends, padding, what stands for images, all that are
    written ``<|so|>``, and all special tokens but tags (``<think>``), which are part of an answer
    whatever the tokenizer calls them."""
    added = tokenizer.added_tokens_decoder
    roles = {tokenizer.convert_tokens_to_ids(token) for token in _roles(tokenizer)} - {None}
    tags = {
        token
        for token, what in added.items()
        if _TAG.fullmatch(what.content) and token not in roles
    }
    marked = {token for token, what in added.items() if _MARKED.fullmatch(what.content)}
    named = (getattr(config, name, None) for name in VISION_TOKENS)
    vision = {token for token in named if token is not None}
    return frozenset((_special(tokenizer) | roles | marked) - tags | set(ends) | vision)


def opened_by(path: str | Path, tokenizer: Any) -> str:
    """Return the text that the template starts an answer with: all from the first tag that it
    leaves open (``<think>\\n``); "" if it opens none."""
    asked = _rendered(path, tokenizer, [_user(_MARK)], add_generation_prompt=True)
    begun = asked.rpartition(_MARK)[2]
    left_open = _open_tags(begun)
    return begun[left_open[0].start() :] if left_open else ""


def closed(opened: str) -> str:
    """Return the tags that close those left open: ``</think>`` after ``<think>\n``."""
    return "".join(f"</{tag[2]}>" for tag in reversed(_open_tags(opened)))


def check_template(path: str | Path, tokenizer: Any, image_token_id: int) -> None:
    """Raise KepoCheckpointError if the chat template fails, leaves the question or its image out,
    changes its text, or renders it differently another time: by chance, or by the day."""
    asked, again = (
        _rendered(path, tokenizer, [_user(_MARK, images=1)], add_generation_prompt=True)
        for _ in range(2)
    )
    images = tokenizer(asked, add_special_tokens=False)["input_ids"].count(image_token_id)
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
            f"{path}: the chat template writes today's date (strftime_now), so the same question "
            "has another prompt on another day; write a fixed date into it"
        )


def check_head(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Raise KepoCheckpointError for a tokenizer with ids beyond the head or the embedding, and for
    logits that are not ``hidden @ lm_head.T``, which the losses assume."""
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
    if getattr(head, "bias", None) is not None:
        raise KepoCheckpointError(
            f"{path}: the model's head has a bias, which the losses would leave out; expected a "
            "head without"
        )
    text = model.config.get_text_config()
    for name, plain in _SCALES.items():
        value = getattr(text, name, None)
        if value not in (None, plain, False):
            raise KepoCheckpointError(
                f"{path}: the config says {name}={value}, which the losses would leave out; "
                "expected a model whose logits are its states times the head"
            )


_SCALES = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
}
"""Settings by which other families change logits, each with the value at which it does nothing."""


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


def check_pictures(path: str | Path, image_processor: Any, config: Any) -> None:
    """Raise KepoCheckpointError if the image processor cuts pictures differently from how the
    vision tower reads them."""
    vision = config.vision_config
    pairs = (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    )
    for mine, theirs in pairs:
        cut, read = getattr(image_processor, mine), getattr(vision, theirs, None)
        if read is not None and cut != read:
            raise KepoCheckpointError(
                f"{path}: preprocessor_config.json says {mine}={cut}, the vision tower "
                f"{theirs}={read}; expected the preprocessor that the model came with"
            )
    if not image_processor.do_resize:
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json says do_resize=false; expected true, as pictures "
            "whose sides are no multiple of a patch cannot be read"
        )
    _check_sizes(path, image_processor)
    _check_colours(path, image_processor)


def _check_sizes(path: str | Path, image_processor: Any) -> None:
    """Check that a resized picture's least and most pixels are numbers, 0 < least <= most."""
    edges = ("shortest_edge", "longest_edge")
    least, most = (dict(image_processor.size).get(name) for name in edges)
    if not (_is_number(least) and _is_number(most) and 0 < least <= most):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json says size with shortest_edge={least!r} and "
            f"longest_edge={most!r}; expected 0 < shortest_edge <= longest_edge, the pixels of the "
            "smallest and the largest picture"
        )


def _check_colours(path: str | Path, image_processor: Any) -> None:
    """Check that each of the three colours comes out as a finite number."""
    wanted = []
    if image_processor.do_rescale:
        factor = image_processor.rescale_factor
        wanted += [("rescale_factor", factor, _is_number(factor) and factor > 0, "a number > 0")]
    if image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
        good = _are_colours(std) and min([std] if _is_number(std) else std) > 0
        wanted += [("image_mean", mean, _are_colours(mean), "a number or three")]
        wanted += [("image_std", std, good, "a number > 0 or three")]
    for name, value, good, expected in wanted:
        if not good:
            raise KepoCheckpointError(
                f"{path}: preprocessor_config.json says {name}={value!r}; expected {expected}"
            )


def _are_colours(values: Any) -> bool:
    several = values if isinstance(values, list | tuple) else [values] * 3
    return len(several) == 3 and all(map(_is_number, several))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def _user(text: str, images: int = 0) -> dict[str, Any]:
    shown = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _rendered(path: str | Path, tokenizer: Any, chat: list[dict[str, Any]], **settings: Any) -> str:
    """Render a chat with the template; KepoCheckpointError if it fails or asks for chance.

    Comparing two results might not reveal chance: two draws can be equal.
    """
    before = random.getstate()
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **settings)
    except Exception as error:  # a template is a program, and may fail in any way
        raise KepoCheckpointError(
            f"{path}: the chat template fails on a message with text and image: {error}"
        ) from error
    if random.getstate() != before:
        random.setstate(before)
        raise KepoCheckpointError(
            f"{path}: the chat template draws at random (|random, lipsum), so that a prompt is "
            "another one at every call; write what it shall say"
        )
    return text


def _closing_token(path: str | Path, tokenizer: Any) -> int | None:
    """Return the token that the template writes after an answer; None if it takes no answers."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
    try:
        said = _rendered(path, tokenizer, [_user("?"), answer])
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
