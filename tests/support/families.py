"""A tiny model of every family and a few pictures, for tests that all models must pass."""

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from kepo.digits.tiny import build_tiny
from kepo.models import vlm
from kepo.models.encoding import Prompt
from kepo.models.families import qwen3_vl, registry
from kepo.models.families.family import TinySize

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

SEEN = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size"),
    *("spatial_merge_size", "temporal_patch_size", "num_position_embeddings"),
)
"""Settings of a vision tower that Qwen3.5 has under the names of Qwen3-VL."""


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


def with_linear_attention(tokenizer):
    """A random Qwen3.5: linear attention in two layers of three. It may take the encoder of a tiny
    Qwen3-VL, whose images are cut alike."""
    pytest.importorskip("transformers.models.qwen3_5")
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vl = qwen3_vl.tiny_config(tokenizer, TinySize(64, 3, 2, 64, 1))
    text = vl.text_config
    shared = {name: getattr(text, name) for name in ("vocab_size", "pad_token_id", "head_dim")}
    vision = {name: getattr(vl.vision_config, name) for name in SEEN}
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3_5Config(
        text_config=dict(
            **shared,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        vision_config=vision | dict(out_hidden_size=64),
        **{name: getattr(vl, name) for name in marks},
    )
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(config).eval()
