"""Qwen3-VL and its mixtures of experts: DeepStack, patches of 16 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kepo.models.families import qwen_vl
from kepo.models.families.family import Family, Tiny, TinySize, windows
from kepo.models.families.processors import pillow_processor_class

PATCH = 16
INITIALIZER_RANGE = 0.06  # with the usual 0.02 a model this narrow is slow to see the image


def tiny_config(tokenizer: Any, size: TinySize) -> Any:
    """Return the ``Qwen3VLConfig`` of a tiny model; the vocabulary's rows are padded to 64."""
    from transformers import Qwen3VLConfig

    head_dim = size.hidden // size.heads
    quarter = head_dim // 8
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            head_dim=head_dim,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,  # prompts are some fifty tokens long
                # The frequencies that time, height and width get; together half a head.
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
                "mrope_interleaved": True,
            },
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=size.tied,
            initializer_range=INITIALIZER_RANGE,
        ),
        vision_config=dict(
            depth=size.vision_depth,
            hidden_size=size.vision_hidden,
            intermediate_size=2 * size.vision_hidden,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=size.hidden,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
            initializer_range=INITIALIZER_RANGE,
        ),
        tie_word_embeddings=size.tied,
        **qwen_vl.token_ids(tokenizer),
    )


def finish_tiny(path: Path, tokenizer: Any) -> None:
    """Write the tokenizer, its chat template in a file of its own, and the preprocessor, as in
    Qwen3-VL."""
    tokenizer.save_pretrained(path)
    pillow_processor_class()(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 256 * 256},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(path)


FAMILY = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    loads="AutoModelForImageTextToText",
    pictures=qwen_vl.pictures,
    marks=qwen_vl.marks,
    check=qwen_vl.check_reads_types,
    positions=qwen_vl.positions,
    arguments=qwen_vl.arguments,
    unshareable=windows,
    decoder=qwen_vl.decoder,
    adapted=qwen_vl.ADAPTED,
    vision=qwen_vl.vision,
    features=qwen_vl.features,
    placed=qwen_vl.placed,
    tower=qwen_vl.tower,
    unplanned=("qwen3_vl_moe",),
    tiny=Tiny("Qwen3VLForConditionalGeneration", tiny_config, finish_tiny),
)
