"""Copies of tiny models with something changed in their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file


def change_json(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_text_config(folder: Path, **settings: object) -> None:
    """Of the language model, in config.json."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config=text | settings)


def change_template(folder: Path, old: str, new: str) -> None:
    file = folder / "chat_template.jinja"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def change_weights(file: Path, edit: Callable[[dict], object]) -> None:
    """Let ``edit`` change the tensors of a file, in place."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def make_special(folder: Path, *tokens: str) -> None:
    """Let the tokenizer's files call these tokens special too."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        listed = [*(content.get("added_tokens") or [])]
        listed += (content.get("added_tokens_decoder") or {}).values()
        for token in listed:
            token["special"] = token["special"] or token["content"] in tokens
        (folder / name).write_text(json.dumps(content))
