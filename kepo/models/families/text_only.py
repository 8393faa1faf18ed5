"""Causal language models without pictures, in transformers' own classes: Qwen3, Llama, SmolLM and
those built like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kepo.errors import KepoCheckpointError
from kepo.models.families.family import (
    Family,
    Tiny,
    TinySize,
    plain_arguments,
    plain_positions,
    taken,
    windows,
)

TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as of Qwen and SmolLM2: what a turn says is a text, and not a list of parts."""


def check(model: Any) -> None:
    """Raise KepoCheckpointError for a model that cannot be told where a token stands, or that keeps
    another state than keys and values of tokens."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    name = type(model).__name__
    if "position_ids" not in taken(type(model)):
        raise KepoCheckpointError(
            f"model: the forward of {name} takes no position_ids, so padded and packed rows would "
            "be given wrong positions; expected a causal language model with rotary positions, "
            "such as Qwen3, Llama or SmolLM2"
        )
    text = model.config.get_text_config()
    layers = DynamicCache(config=text).layers
    others = {type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)}
    if others or not hasattr(model.base_model, "layers"):
        raise KepoCheckpointError(
            f"model: {name} keeps {', '.join(sorted(others)) or 'its layers elsewhere'}; expected "
            "a transformer whose layers keep keys and values, such as Qwen3, Llama or SmolLM2"
        )


def tiny_config(tokenizer: Any, size: TinySize) -> Any:
    """Return the ``Qwen3Config`` of a tiny model; the vocabulary's rows are padded to 64."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=size.tied,
        initializer_range=0.06,
    )


def finish_tiny(path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)


FAMILY = Family(
    name="text only",
    model_types=(),
    loads="AutoModelForCausalLM",
    pictures=None,
    marks=lambda config, tokenizer: set(),
    check=check,
    positions=plain_positions,
    arguments=plain_arguments,
    unshareable=windows,
    decoder=lambda model: model.base_model,
    adapted="all-linear",
    tiny=Tiny("Qwen3ForCausalLM", tiny_config, finish_tiny),
)
