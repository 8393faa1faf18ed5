"""The settings ``min_pixels`` and ``max_pixels``: how large the models see pictures."""

from __future__ import annotations

from kepo.errors import KepoConfigError
from kepo.models.encoding import Encoder
from kepo.sections import PicturesConfig

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""The settings, and what Qwen's image processors call them; all are pixels, width times height."""


def resize_pictures(encoder: Encoder, config: PicturesConfig, path: str) -> Encoder:
    """Let an encoder resize pictures as the settings say, and return it; what they leave open stays
    as the model's preprocessor_config.json has it.

    A processor keeps a picture's shape and rounds its sides to whole tokens, so the pixels may miss
    the bounds by that rounding. path: the model, for messages. Raises KepoConfigError if its
    pictures cannot be resized so.
    """
    wanted: dict[str, int | None] = {name: getattr(config, name) for name in EDGES}
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given:
        return encoder
    first, processor = next(iter(given)), encoder.image_processor
    size = dict(getattr(processor, "size", None) or {})
    if not all(edge in size for edge in EDGES.values()):
        raise KepoConfigError(
            f"{first}={given[first]}: {path} does not resize pictures by their number of pixels; "
            "leave it out"
        )
    edges = {edge: given[name] if name in given else size[edge] for name, edge in EDGES.items()}
    least, most = edges["shortest_edge"], edges["longest_edge"]
    token = (processor.patch_size * processor.merge_size) ** 2
    if most < token:
        raise KepoConfigError(
            f"max_pixels={most} is less than the {token} pixels of one token of {path}; give more"
        )
    if least > most:
        own = [name for name in EDGES if name not in given]
        says = f" ({own[0]} as its preprocessor_config.json says)" if own else ""
        raise KepoConfigError(
            f"{first}={given[first]}: the smallest picture of {path} would have {least} pixels, "
            f"the largest {most}{says}; expected min_pixels <= max_pixels, so set both"
        )
    processor.size = type(processor.size)(**edges)
    return encoder
