"""Qwen2.5-VL, and Qwen2-VL: windows of the picture in most blocks, patches of 14 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kepo.models.families import qwen_vl
from kepo.models.families.family import Family, Tiny, TinySize, windows

PATCH = 14
INITIALIZER_RANGE = 0.06

# Qwen2.5-VL's template first says who the model is.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(tokenizer: Any, size: TinySize) -> Any:
    """Return the ``Qwen2_5_VLConfig`` of a tiny model.

    Its vision tower has one more block, so that some see windows of the image and some all of it.
    """
    from transformers import Qwen2_5_VLConfig

    head_dim = size.hidden // size.heads
    quarter = head_dim // 8
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
            },
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=size.tied,
            initializer_range=INITIALIZER_RANGE,
        ),
        vision_config=dict(
            depth=size.vision_depth + 1,
            hidden_size=size.vision_hidden,
            intermediate_size=2 * size.vision_hidden,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=size.hidden,
            window_size=4 * PATCH,
            fullatt_block_indexes=[size.vision_depth],
            initializer_range=INITIALIZER_RANGE,
        ),
        tie_word_embeddings=size.tied,
        **qwen_vl.token_ids(tokenizer),
    )


def finish_tiny(path: Path, tokenizer: Any) -> None:
    """Write the same files as in Qwen2.5-VL: the chat template is among the tokenizer's settings,
    and the preprocessor's have their older names."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path, save_jinja_files=False)
    settings = {
        "min_pixels": (2 * PATCH) ** 2,
        "max_pixels": 256 * 256,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (path / "preprocessor_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


FAMILY = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl", "qwen2_vl"),
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
    unplanned=("qwen2_vl",),
    tiny=Tiny("Qwen2_5_VLForConditionalGeneration", tiny_config, finish_tiny),
)
