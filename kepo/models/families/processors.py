"""Image processors: transformers' torchvision ones if torchvision works, otherwise Pillow's.

Both give the same grids and, except where an image is resized, the same values up to rounding.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any, TypeGuard

import torch

from kepo.errors import KepoCheckpointError

QWEN = "Qwen2VLImageProcessor"


def image_processor_class(name: str = QWEN) -> Any:
    """Return the faster of the processors of this name that work here, by the name that this
    transformers gives it."""
    if not without_broken_torchvision():
        return pillow_processor_class(name)
    import transformers

    if hasattr(transformers, f"{name}Pil"):  # 5.4 and later: there are both
        return getattr(transformers, name)
    return getattr(transformers, f"{name}Fast")


def pillow_processor_class(name: str = QWEN) -> Any:
    """Return the processor of this name that needs no torchvision."""
    without_broken_torchvision()
    import transformers

    # Before 5.4 the plain name was that of the PIL one.
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


@functools.cache
def without_broken_torchvision() -> bool:
    """Return whether torchvision works; if it is installed but broken, hide it, as if missing.

    It works if it resizes. Beside a torch it was not built for, its own operators do not exist,
    and as a rule it cannot be imported; transformers, which only sees that it is installed, then
    cannot import a single vision model. Call it before the first of them is imported.
    """
    try:
        from torchvision.transforms.v2 import functional

        functional.resize(torch.zeros(3, 2, 2), [4, 4])
        return True
    except Exception:  # not there, or of a broken binary anything
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # import says: not found
        return False


def check_colours(path: str | Path, image_processor: Any) -> None:
    """Raise KepoCheckpointError if a colour does not come out as a finite number."""
    wanted = []
    if image_processor.do_rescale:
        factor = image_processor.rescale_factor
        wanted += [("rescale_factor", factor, is_number(factor) and factor > 0, "a number > 0")]
    if image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
        good = _are_colours(std) and min([std] if is_number(std) else std) > 0
        wanted += [("image_mean", mean, _are_colours(mean), "a number or three")]
        wanted += [("image_std", std, good, "a number > 0 or three")]
    for name, value, good, expected in wanted:
        if not good:
            raise KepoCheckpointError(
                f"{path}: preprocessor_config.json says {name}={value!r}; expected {expected}"
            )


def _are_colours(values: Any) -> bool:
    several = values if isinstance(values, list | tuple) else [values] * 3
    return len(several) == 3 and all(map(is_number, several))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
