"""The image processor: transformers' torchvision one if torchvision works, otherwise Pillow's.

Both give the same grids and, except where an image is resized, the same values up to rounding.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


def image_processor_class() -> Any:
    """Return the faster of the processors that work here, by the name this transformers gives
    it."""
    if not without_broken_torchvision():
        return pillow_processor_class()
    try:
        import transformers

        transformers.Qwen2VLImageProcessorPil  # noqa: B018  5.4 and later: there are both
        return transformers.Qwen2VLImageProcessor
    except AttributeError:
        return transformers.Qwen2VLImageProcessorFast


def pillow_processor_class() -> Any:
    """Return the processor that needs no torchvision."""
    without_broken_torchvision()
    try:
        from transformers import Qwen2VLImageProcessorPil  # 5.4 and later

        return Qwen2VLImageProcessorPil
    except ImportError:
        from transformers import Qwen2VLImageProcessor  # before, this name was the PIL one

        return Qwen2VLImageProcessor


@functools.cache
def without_broken_torchvision() -> bool:
    """Return whether torchvision works; if it is installed but broken, hide it, as if missing.

    Beside a torch it was not built for, its own operators do not exist, and transformers, which
    only sees that it is installed, then cannot import a single vision model. Call it before the
    first of them is imported.
    """
    try:
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        return True
    except Exception:  # not there, or of a broken binary anything
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # import says: not found
        return False
