"""The inputs of a model's forward, made so that the vision tower sees an image once.

Rows that show the same image, as the completions of one question do, share its features; gradients
of a trained tower flow through them from every row and add up.
"""

from __future__ import annotations

from typing import Any

import torch

from kepo.errors import KepoDataError
from kepo.models.encoding import Inputs
from kepo.models.families.family import taken
from kepo.models.families.registry import family_of


def forward_inputs(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the keyword arguments of the model's, or its backbone's, forward and ``generate``.

    Runs the vision tower, on every image once, where this transformers takes its features; before
    5.18 or so the rows get the images themselves. Raises KepoCheckpointError for a model that its
    family refuses.
    """
    family = family_of(model.config)
    family.check(model)
    given = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        **family.arguments(model, inputs),
    }
    places = [place for places in inputs.image_places for place in places]
    if not places:
        return given
    if not takes_features(model):
        return given | {"pixel_values": inputs.patches(places)}
    assert family.features and family.placed, "only families that see have prompts with pictures"
    # Gradient checkpointing lets a tower's input require gradients, even where it is frozen.
    weights = [weight for module in family.vision(model) for weight in module.parameters()]
    trained = any(weight.requires_grad for weight in weights)
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features = family.features(model, inputs)
    return given | {"mm_encoder_outputs": {"image": family.placed(features, inputs, places)}}


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
    return "mm_encoder_outputs" in taken(model.__class__) & taken(model.model.__class__)


def cache_name(model: Any) -> str:
    """Return the name that this transformers gives a forward's cache; 5.40 drops the older one."""
    return "cache" if "cache" in taken(model.__class__) else "past_key_values"
