"""A LoRA on the LM head in TRL's trainers, which refuse it as their own losses would ignore it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PEFTS_LAYER = "BaseTunerLayer"
"""Name in TRL's modules of the class by which they tell an adapted head."""


class _NoLayer:
    """A class that no layer is of."""


@contextmanager
def lora_on_head(module: Any) -> Iterator[None]:
    """Let a trainer of this module of TRL's be made with a LoRA on its head."""
    before = getattr(module, PEFTS_LAYER, None)
    if before is None:  # PEFT is not installed
        yield
        return
    setattr(module, PEFTS_LAYER, _NoLayer)
    try:
        yield
    finally:
        setattr(module, PEFTS_LAYER, before)
