"""The families that can be trained, and which of them a config is of.

To add one, write its file, with a `FAMILY` in it, and add its name here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kepo.models.families.family import Family

NAMES = (
    "qwen3_vl",
    "qwen2_5_vl",
    "internvl",
    "text_only",
)
"""The files of this folder that hold a family."""

FAMILIES: dict[str, Family] = {
    name: import_module(f"kepo.models.families.{name}").FAMILY for name in NAMES
}


def family_of(config: Any) -> Family:
    """Return the family of a config of transformers.

    Raises LookupError, which says in words what was expected, if none of them takes it.
    """
    for family in FAMILIES.values():
        if config.model_type in family.model_types:
            return family
    if not hasattr(config, "vision_config") and not hasattr(config, "image_token_id"):
        for family in FAMILIES.values():
            if not family.model_types:
                return family
    known = [kind for family in FAMILIES.values() for kind in family.model_types]
    raise LookupError(
        f"is a model of type {config.model_type!r} that sees pictures in a way not known here; "
        f"expected one of {', '.join(known)}, or a causal language model without pictures"
    )
