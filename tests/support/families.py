"""A tiny model of every family and a few pictures, for tests that all models must pass."""

import copy
from pathlib import Path

import torch
from PIL import Image

from kepo.digits.tiny import build_tiny
from kepo.models import vlm
from kepo.models.encoding import Prompt
from kepo.models.families import registry

FAMILIES = {
    "qwen3": {},
    "qwen3-tied": dict(tied=True),
    "qwen2.5": dict(family="qwen2_5_vl"),
}
"""Models whose pictures are Qwen's, by the names of their folders."""

EVERY = FAMILIES | {
    name: dict(family=name) for name in registry.FAMILIES if name not in ("qwen3_vl", "qwen2_5_vl")
}
"""Those, and one of every other family that is registered."""


def build(root: Path) -> Path:
    """Write a student of each family below root."""
    for name, settings in EVERY.items():
        build_tiny(root / name, size="student", seed=0, **settings)
    return root


def asked(model: vlm.VLM, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts, without their pictures where the model sees none."""
    if model.encoder.pictures is not None:
        return prompts
    return [Prompt(prompt.text) for prompt in prompts]


def pictures(root: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Noise of these widths and heights."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number, (width, height) in enumerate(sizes):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        paths.append(root / f"{number}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


def with_a_sliding_window(model, width: int):
    """A copy of a Qwen2.5-VL with a window of so many tokens in its second layer."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.use_sliding_window, text.sliding_window = True, width
    text.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    windowed = type(model)(config).eval()
    windowed.load_state_dict(model.state_dict())
    return windowed
