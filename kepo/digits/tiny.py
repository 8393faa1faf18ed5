"""Tiny random models of every family that know the digits' few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kepo.data.load import Example
from kepo.digits.dataset import QUESTION, SMALL_DIGITS
from kepo.miniature.tiny_models import Size, texts_about, tokenizer_of, write_tiny

_ONE = Example(
    id="",
    question=QUESTION,
    options=("0", "1", "2", "3"),
    answer="A",
    images=(),
    modality="",
    question_type=SMALL_DIGITS,
    rationale="3 + 5 = 8",
)
"""One question is enough: all are worded alike, and every digit is a token of its own."""


def build_tiny(
    path: str | Path, *, size: Size, seed: int, family: str = "qwen3_vl", tied: bool = False
) -> None:
    """Write a random fp32 model for the digits, as `kepo.miniature.tiny_models.write_tiny` does."""
    write_tiny(path, texts_about([_ONE]), size=size, seed=seed, family=family, tied=tied)


def build_tokenizer() -> Any:
    """Build the tokenizer of the models that `build_tiny` writes."""
    return tokenizer_of(texts_about([_ONE]))
