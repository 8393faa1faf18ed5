"""InternVL 3 and 3.5, as transformers has them: a picture is one or several square tiles of one
size, and positions are those of plain text.

Chosen before Gemma 3, whose image tokens see each other both ways and whose layers mostly see a
window: a packed row would need two masks, and completions a cache that forgets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kepo.errors import KepoCheckpointError
from kepo.models.families.family import (
    Family,
    Make,
    Pictures,
    Piece,
    Tiny,
    TinySize,
    Tower,
    plain_arguments,
    plain_positions,
    taken,
    windows,
)
from kepo.models.families.processors import (
    check_colours,
    image_processor_class,
    pillow_processor_class,
)

PROCESSOR = "GotOcr2ImageProcessor"
ENCLOSING = ("start_image_token", "end_image_token")
"""The tokenizer's names for the tokens around a picture, which the template does not write."""
OTHERS = ("context_image_token", "video_token")


# ---- pictures ----


def marks(config: Any, tokenizer: Any) -> set[int]:
    named = (getattr(tokenizer, f"{name}_id", None) for name in (*ENCLOSING, *OTHERS))
    return {config.image_token_id, *(token for token in named if token is not None)}


def pictures(path: str | Path, config: Any, tokenizer: Any) -> Pictures:
    """Read the image processor of a folder; KepoCheckpointError if it is another model's."""
    kind = image_processor_class(PROCESSOR)
    stated = kind.get_image_processor_dict(path)[0].get("image_processor_type")
    if stated is not None and not stated.startswith(PROCESSOR):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json names the image processor {stated}; expected "
            f"{PROCESSOR}, which InternVL's models of transformers have"
        )
    processor = kind.from_pretrained(path)
    _check_tiles(path, processor, config)
    check_colours(path, processor)
    before, after = (getattr(tokenizer, f"{name}_id", None) for name in ENCLOSING)
    if before is None or after is None:
        raise KepoCheckpointError(
            f"{path}: tokenizer_config.json names no {' or no '.join(ENCLOSING)}, which enclose a "
            "picture; expected the tokenizer that the model came with"
        )
    each = config.image_seq_length
    return Pictures(
        processor,
        config.image_token_id,
        _read,
        count=lambda processor, grid: each * int(grid.prod()),
        count_by_size=lambda processor, width, height: each * _tiles(processor, width, height),
        before=(before,),
        after=(after,),
        vllm=lambda processor: {},  # it reads the same file, and no setting of ours changes it
    )


def _check_tiles(path: str | Path, processor: Any, config: Any) -> None:
    """Check that tiles have the size that the vision tower has positions for, and become as many
    tokens as the config says."""
    vision, size = config.vision_config, dict(processor.size)
    height, width = vision.image_size
    if (size.get("height"), size.get("width")) != (height, width):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json says size={size}, the vision tower image_size="
            f"{[height, width]}; expected the preprocessor that the model came with"
        )
    if not processor.do_resize:
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json says do_resize=false; expected true, as only tiles "
            "of one size can be read"
        )
    if (found := _tokens_of_a_tile(config)) != config.image_seq_length:
        raise KepoCheckpointError(
            f"{path}: config.json says image_seq_length={config.image_seq_length}, and a tile "
            f"becomes {found} tokens by its image_size, patch_size and downsample_ratio"
        )


def _patches_of_a_tile(config: Any) -> int:
    vision = config.vision_config
    sides = zip(vision.image_size, vision.patch_size, strict=True)
    rows, columns = (side // patch for side, patch in sides)
    return rows * columns


def _tokens_of_a_tile(config: Any) -> int:
    return int(_patches_of_a_tile(config) * config.downsample_ratio**2)


def _read(processor: Any, picture: Any) -> tuple[Tensor, Tensor]:
    out = processor(images=[picture], return_tensors="pt")
    return out["pixel_values"], torch.tensor([len(out["pixel_values"]), 1, 1])


def _tiles(processor: Any, width: int, height: int) -> int:
    none: dict[str, Any] = {}  # of its settings are changed
    return processor.get_number_of_image_patches(height, width, none)


# ---- forward ----


def check(model: Any) -> None:
    """Raise KepoCheckpointError for a forward that cannot be told where a token stands."""
    if "position_ids" not in taken(type(model.model)):
        raise KepoCheckpointError(
            f"model: the forward of {type(model.model).__name__} does not take position_ids; "
            "expected an InternVL of transformers 5.4 or later"
        )


def vision(model: Any) -> list[nn.Module]:
    return [model.model.vision_tower, model.model.multi_modal_projector]


def features(model: Any, inputs: Any) -> Any:
    return model.model.get_image_features(pixel_values=inputs.pixel_values, return_dict=True)


def placed(features: Any, inputs: Any, places: Sequence[int]) -> Any:
    """Return the features of the tiles of the pictures at these places."""
    tiles = features.pooler_output.split(inputs.image_grid_thw.prod(-1).tolist())
    features.pooler_output = torch.cat([tiles[place] for place in places])
    return features


# ---- for the planner ----


def tower(model: Any) -> Tower:
    """Return the vision tower's parts. A tile has a token of its class beside its patches."""
    config, inner = model.config, model.model
    settings, each = config.vision_config, _patches_of_a_tile(config)
    height, width = settings.patch_size
    side = int(each**0.5)

    def tiles(patches: int) -> int:
        return max(1, patches // each)  # some are those of the tokens around a picture

    def block(make: Make, pictures: int, patches: int) -> Piece:
        one = inner.vision_tower.encoder.layer[0]
        return one, partial(one, make(pictures * tiles(patches), each + 1, settings.hidden_size))

    def embed(make: Make, patches: int) -> Piece:
        pixels = torch.empty(tiles(patches), 3, *settings.image_size, device="meta")
        return inner.vision_tower.embeddings, partial(inner.vision_tower.embeddings, pixels)

    def mergers(make: Make, patches: int) -> list[Piece]:
        x = make(tiles(patches), side, side, settings.hidden_size)

        def merge() -> Tensor:
            shuffled = inner.pixel_shuffle(x, scale_factor=config.downsample_ratio)
            return inner.multi_modal_projector(shuffled.flatten(1, 2))

        return [(inner.multi_modal_projector, merge)]

    return Tower(
        blocks=inner.vision_tower.encoder.layer,
        patches_per_token=each // config.image_seq_length,
        patch_values=3 * height * width,
        default_tokens=lambda least, most: config.image_seq_length + 2,  # one tile
        features=1,
        block=block,
        embed=embed,
        mergers=mergers,
    )


# ---- for tiny models ----

PATCH, TILE = 14, 56
TOKENS_OF_A_TILE = (TILE // PATCH) ** 2 // 4
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_config(tokenizer: Any, size: TinySize) -> Any:
    """Return the ``InternVLConfig`` of a tiny model on Qwen2; the vocabulary's rows are padded to
    64."""
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config=dict(
            model_type="qwen2",
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=size.tied,
            initializer_range=0.06,
        ),
        vision_config=dict(
            num_hidden_layers=size.vision_depth,
            hidden_size=size.vision_hidden,
            intermediate_size=2 * size.vision_hidden,
            num_attention_heads=4,
            patch_size=[PATCH, PATCH],
            image_size=[TILE, TILE],
            initializer_range=0.06,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(TOKENS["context_image_token"]),
        image_seq_length=TOKENS_OF_A_TILE,
        tie_word_embeddings=size.tied,
    )


def finish_tiny(path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"extra_special_tokens": TOKENS}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS_OF_A_TILE}
    file = path / "processor_config.json"
    file.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    pillow_processor_class(PROCESSOR)(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        max_patches=4,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(path)


FAMILY = Family(
    name="InternVL",
    model_types=("internvl",),
    loads="AutoModelForImageTextToText",
    pictures=pictures,
    marks=marks,
    check=check,
    positions=plain_positions,
    arguments=plain_arguments,
    unshareable=windows,
    decoder=lambda model: model.model.language_model,
    adapted=r".*language_model\.layers\..*_proj",
    vision=vision,
    features=features,
    placed=placed,
    tower=tower,
    tiny=Tiny("InternVLForConditionalGeneration", tiny_config, finish_tiny, tuple(TOKENS.values())),
)
