"""What Qwen2.5-VL and Qwen3-VL have in common: pictures of any size, cut into patches that are
merged into tokens, and positions in time, height and width."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kepo.errors import KepoCheckpointError
from kepo.models.families.family import Make, Pictures, Piece, Tower, taken
from kepo.models.families.processors import check_colours, image_processor_class, is_number

MARKS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""Names in a config of the tokens that stand for images and videos, or enclose them."""
ADAPTED = r".*language_model\.layers\..*_proj"
"""A pattern for every linear layer of the language model: not the head, which the losses read as
one matrix, and not the vision tower."""


def marks(config: Any, tokenizer: Any) -> set[int]:
    return {getattr(config, name) for name in MARKS if getattr(config, name, None) is not None}


def check_reads_types(model: Any) -> None:
    """Raise KepoCheckpointError for a model that does not read ``mm_token_type_ids``: without them
    a Qwen2.5-VL takes image tokens for text, and says nothing."""
    for part in (model, model.model):
        if "mm_token_type_ids" not in taken(part.__class__):
            raise KepoCheckpointError(
                f"model: the forward of {type(part).__name__} does not take mm_token_type_ids, so "
                "images would be given wrong positions; expected a Qwen2-VL, Qwen2.5-VL or "
                "Qwen3-VL model of transformers 5.4 or later"
            )


# ---- pictures ----


def pictures(path: str | Path, config: Any, tokenizer: Any) -> Pictures:
    """Read the image processor of a folder; KepoCheckpointError if it is another model's."""
    kind = image_processor_class()
    stated = kind.get_image_processor_dict(path)[0].get("image_processor_type")
    if stated is not None and not re.match(r"Qwen\w*VLImageProcessor", stated):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json names the image processor {stated}; expected "
            "Qwen2VLImageProcessor, which belongs to the Qwen-VL models that kepo can train"
        )
    processor = kind.from_pretrained(path)
    _check_pictures(path, processor, config)
    return pictures_of(processor, config.image_token_id)


def pictures_of(processor: Any, token: int) -> Pictures:
    """Return how an image processor of Qwen's reads pictures."""
    return Pictures(processor, token, _read, _count, _count_by_size, vllm=_edges)


def _edges(processor: Any) -> dict[str, Any]:
    edges = ("shortest_edge", "longest_edge")
    return dict(size={name: processor.size[name] for name in edges})


def _check_pictures(path: str | Path, image_processor: Any, config: Any) -> None:
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
    check_colours(path, image_processor)


def _check_sizes(path: str | Path, image_processor: Any) -> None:
    """Check that a resized picture's least and most pixels are numbers, 0 < least <= most."""
    edges = ("shortest_edge", "longest_edge")
    least, most = (dict(image_processor.size).get(name) for name in edges)
    if not (is_number(least) and is_number(most) and 0 < least <= most):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json says size with shortest_edge={least!r} and "
            f"longest_edge={most!r}; expected 0 < shortest_edge <= longest_edge, the pixels of the "
            "smallest and the largest picture"
        )


def _read(processor: Any, picture: Any) -> tuple[Tensor, Tensor]:
    out = processor(images=[picture], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"][0]


def _count(processor: Any, grid: Tensor) -> int:
    return int(grid.prod()) // processor.merge_size**2


def _count_by_size(processor: Any, width: int, height: int) -> int:
    none: dict[str, Any] = {}  # of its settings are changed; transformers 5.5 wants to be told
    count = processor.get_number_of_image_patches(height, width, none)
    return count // processor.merge_size**2


# ---- forward ----


def positions(model: Any, inputs: Any) -> Tensor:
    """Return (3, B, L) positions in time, height and width, which the model finds itself."""
    places = [place for places in inputs.image_places for place in places]
    found, _ = model.model.get_rope_index(
        input_ids=inputs.input_ids.cpu(),
        mm_token_type_ids=inputs.mm_token_type_ids.cpu(),
        image_grid_thw=inputs.image_grid_thw[places].cpu(),
        attention_mask=inputs.attention_mask.cpu(),
    )
    return found


def arguments(model: Any, inputs: Any) -> dict[str, Any]:
    places = [place for places in inputs.image_places for place in places]
    return {
        "mm_token_type_ids": inputs.mm_token_type_ids,
        "image_grid_thw": inputs.image_grid_thw[places],  # (0, 3) keeps positions ours without any
    }


def vision(model: Any) -> list[nn.Module]:
    return [model.model.visual]


def features(model: Any, inputs: Any) -> Any:
    return model.model.get_image_features(
        inputs.pixel_values, inputs.image_grid_thw, return_dict=True
    )


def placed(features: Any, inputs: Any, places: Sequence[int]) -> Any:
    """Return the features of the images at these places: the pooled, and DeepStack's."""
    pooled = features.pooler_output
    features.pooler_output = tuple(pooled[place] for place in places)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [
            tuple(layer[place] for place in places) for layer in features.deepstack_features
        ]
    return features


def decoder(model: Any) -> Any:
    return model.model.language_model


# ---- for the planner ----


def tower(model: Any) -> Tower:
    """Return the vision tower's parts; DeepStack's mergers come before the last one."""
    config, visual = model.config.vision_config, model.model.visual
    side = config.patch_size * config.spatial_merge_size
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2

    def block(make: Make, pictures: int, patches: int) -> Piece:
        x = make(pictures * patches, config.hidden_size)
        width = config.hidden_size // config.num_heads
        rotary = tuple(make(pictures * patches, width).detach() for _ in range(2))
        ends = torch.arange(pictures + 1, dtype=torch.int32) * patches
        one = visual.blocks[0]
        return one, lambda: one(x, cu_seqlens=ends, position_embeddings=rotary)

    def embed(make: Make, patches: int) -> Piece:
        pixels = torch.empty(patches, values, device="meta")
        return visual.patch_embed, lambda: visual.patch_embed(pixels)

    def mergers(make: Make, patches: int) -> list[Piece]:
        x = make(patches, config.hidden_size)
        modules = [*getattr(visual, "deepstack_merger_list", []), visual.merger]
        return [(module, functools.partial(module, x)) for module in modules]

    return Tower(
        blocks=visual.blocks,
        patches_per_token=config.spatial_merge_size**2,
        patch_values=values,
        default_tokens=functools.partial(_default_tokens, side),
        features=1 + len(getattr(visual, "deepstack_merger_list", [])),
        block=block,
        embed=embed,
        mergers=mergers,
    )


def _default_tokens(side: int, least: int | None, most: int | None) -> int:
    """Return the tokens of a picture of 384 x 384 pixels within the limits, its sides rounded to
    whole tokens of ``side`` pixels."""
    pixels = max(384**2, least or 0)
    if most is not None and most < pixels:  # rounded down, as image processors do
        return max(1, math.floor(math.sqrt(most) / side)) ** 2
    exact = math.sqrt(pixels) / side
    return (round(exact) if pixels == 384**2 else math.ceil(exact)) ** 2


# ---- for tiny models ----


def token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
