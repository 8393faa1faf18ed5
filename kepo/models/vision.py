"""The inputs of a Qwen-VL model's forward, made so that the vision tower sees an image once.

Rows that show the same image, as the completions of one question do, share its features; gradients
of a trained tower flow through them from every row and add up.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from kepo.errors import KepoCheckpointError, KepoDataError
from kepo.models.encoding import Inputs


def forward_inputs(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the keyword arguments of the model's, or its backbone's, forward and ``generate``.

    Runs the vision tower, on every image once, where this transformers takes its features; before
    5.18 or so the rows get the images themselves. Raises KepoCheckpointError for a model that does
    not read ``mm_token_type_ids``.
    """
    check_reads_types(model)
    places = [place for places in inputs.image_places for place in places]
    given = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "mm_token_type_ids": inputs.mm_token_type_ids,
        "image_grid_thw": inputs.image_grid_thw[places],  # (0, 3) keeps positions ours without any
    }
    if not places:
        return given
    if not takes_features(model):
        return given | {"pixel_values": inputs.patches(places)}
    # Gradient checkpointing lets a tower's input require gradients, even where it is frozen.
    trained = any(parameter.requires_grad for parameter in model.model.visual.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features = model.model.get_image_features(
            inputs.pixel_values, inputs.image_grid_thw, return_dict=True
        )
    return given | {"mm_encoder_outputs": {"image": _placed(features, places)}}


def check_length(model: Any, inputs: Inputs, new_tokens: int) -> None:
    """Raise KepoDataError if a prompt and ``new_tokens`` more exceed the model's positions."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or inputs.input_ids.shape[1] + new_tokens <= limit:
        return
    longest = int(inputs.attention_mask.sum(-1).max())  # rows that were selected keep their padding
    if longest + new_tokens > limit:
        raise KepoDataError(
            f"inputs: a prompt has {longest} tokens, of images and text, and its completion up to "
            f"{new_tokens}; expected at most {limit} together (max_position_embeddings of the "
            "model): prompts are not cut, so give smaller images, less text or a shorter limit"
        )


def takes_features(model: Any) -> bool:
    """Return whether forwards accept image features in place of pixels."""
    names = _parameters(model.__class__) & _parameters(model.model.__class__)
    return "mm_encoder_outputs" in names


def cache_name(model: Any) -> str:
    """Return the name that this transformers gives a forward's cache; 5.40 drops the older one."""
    return "cache" if "cache" in _parameters(model.__class__) else "past_key_values"


def check_reads_types(model: Any) -> None:
    """Raise KepoCheckpointError for a model that does not read ``mm_token_type_ids``: without them
    a Qwen2.5-VL takes image tokens for text, and says nothing."""
    for part in (model, model.model):
        if "mm_token_type_ids" not in _parameters(part.__class__):
            raise KepoCheckpointError(
                f"model: the forward of {type(part).__name__} does not take mm_token_type_ids, so "
                "images would be given wrong positions; expected a Qwen2-VL, Qwen2.5-VL or "
                "Qwen3-VL model of transformers 5.4 or later"
            )


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _placed(features: Any, places: Sequence[int]) -> Any:
    """Return the features of the images at these places: the pooled, and DeepStack's."""
    pooled = features.pooler_output
    features.pooler_output = tuple(pooled[place] for place in places)
    if getattr(features, "deepstack_features", None) is not None:
        features.deepstack_features = [
            tuple(layer[place] for place in places) for layer in features.deepstack_features
        ]
    return features
