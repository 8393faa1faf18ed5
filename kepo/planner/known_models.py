"""Records of the released models, with enough numbers to build each one without its files.

The numbers are those of the public config.json; a test compares the parameters they come to with
the published totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tower:
    """Layers of one shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int = 0
    """0 = as many as heads."""


@dataclass(frozen=True)
class KnownModel:
    """A released model."""

    family: str
    """A key of _CONFIGS."""
    text: Tower
    vision: Tower | None
    """None if it sees no pictures."""
    tied: bool
    """True if the head is the embedding."""
    vocab: int = 151936
    """Rows of the head; the tokenizer has fewer tokens."""

    def config(self) -> Any:
        """Return the transformers config of this model."""
        return _CONFIGS[self.family](self)


def _qwen3(text: Tower, vision: Tower, tied: bool) -> KnownModel:
    return KnownModel("Qwen3-VL", text, vision, tied)


def _internvl(text: Tower) -> KnownModel:
    return KnownModel("InternVL3", text, _SMALL_VISION, False, 151674)


_SMALL_VISION = Tower(1024, 4096, 24, 16)
_LARGE_VISION = Tower(1152, 4304, 27, 16)
KNOWN: dict[str, KnownModel] = {
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3(Tower(2048, 6144, 28, 16, 8), _SMALL_VISION, True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(Tower(2560, 9728, 36, 32, 8), _SMALL_VISION, True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(Tower(4096, 12288, 36, 32, 8), _LARGE_VISION, False),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3(Tower(5120, 25600, 64, 64, 8), _LARGE_VISION, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": KnownModel(
        "Qwen2.5-VL", Tower(2048, 11008, 36, 16, 2), Tower(1280, 3420, 32, 16), True
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": KnownModel(
        "Qwen2.5-VL", Tower(3584, 18944, 28, 28, 4), Tower(1280, 3420, 32, 16), False, 152064
    ),
    "Qwen/Qwen2.5-VL-32B-Instruct": KnownModel(
        "Qwen2.5-VL", Tower(5120, 27648, 64, 40, 8), Tower(1280, 3456, 32, 16), False, 152064
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": KnownModel(
        "Qwen2.5-VL", Tower(8192, 29568, 80, 64, 8), Tower(1280, 3456, 32, 16), False, 152064
    ),
    "OpenGVLab/InternVL3-1B-hf": _internvl(Tower(896, 4864, 24, 14, 2)),
    "OpenGVLab/InternVL3-2B-hf": _internvl(Tower(1536, 8960, 28, 12, 2)),
    "OpenGVLab/InternVL3-8B-hf": _internvl(Tower(3584, 18944, 28, 28, 4)),
    "OpenGVLab/InternVL3-14B-hf": _internvl(Tower(5120, 13824, 48, 40, 8)),
    "Qwen/Qwen3-0.6B": KnownModel("Qwen3", Tower(1024, 3072, 28, 16, 8), None, True),
    "Qwen/Qwen3-1.7B": KnownModel("Qwen3", Tower(2048, 6144, 28, 16, 8), None, True),
    "Qwen/Qwen3-4B": KnownModel("Qwen3", Tower(2560, 9728, 36, 32, 8), None, True),
    "Qwen/Qwen3-8B": KnownModel("Qwen3", Tower(4096, 12288, 36, 32, 8), None, False),
    "meta-llama/Llama-3.2-1B-Instruct": KnownModel(
        "Llama-3.2", Tower(2048, 8192, 16, 32, 8), None, True, 128256
    ),
    "meta-llama/Llama-3.2-3B-Instruct": KnownModel(
        "Llama-3.2", Tower(3072, 8192, 28, 24, 8), None, True, 128256
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownModel(
        "SmolLM2", Tower(576, 1536, 30, 9, 3), None, True, 49152
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": KnownModel(
        "SmolLM2", Tower(960, 2560, 32, 15, 5), None, True, 49152
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": KnownModel(
        "SmolLM2", Tower(2048, 8192, 24, 32), None, True, 49152
    ),
}


def known_model(name: str) -> KnownModel | None:
    """The record of a Hub name, with or without its owner; None if there is none."""
    return next((m for known, m in KNOWN.items() if name in (known, known.split("/")[1])), None)


def _qwen3_config(model: KnownModel) -> Any:
    from transformers import Qwen3VLConfig

    vision = _vision(model)
    return Qwen3VLConfig(
        text_config=dict(
            **_text(model),
            max_position_embeddings=262_144,
            head_dim=128,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        ),
        vision_config=dict(
            **vision,
            patch_size=16,
            num_position_embeddings=2304,
            # Three layers of the vision tower feed the first three of the language model.
            deepstack_visual_indexes=[8, 16, 24] if vision["depth"] == 27 else [5, 11, 17],
        ),
        tie_word_embeddings=model.tied,
    )


def _qwen25_config(model: KnownModel) -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=dict(
            **_text(model),
            max_position_embeddings=128_000,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        ),
        vision_config=dict(
            **_vision(model),
            patch_size=14,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        ),
        tie_word_embeddings=model.tied,
    )


def _internvl_config(model: KnownModel) -> Any:
    from transformers import InternVLConfig

    assert model.vision is not None, "it sees"
    return InternVLConfig(
        text_config=dict(model_type="qwen2", **_text(model), max_position_embeddings=32_768),
        vision_config=dict(
            hidden_size=model.vision.hidden,
            intermediate_size=model.vision.intermediate,
            num_hidden_layers=model.vision.layers,
            num_attention_heads=model.vision.heads,
            attention_bias=True,
        ),
        tie_word_embeddings=model.tied,
    )


def _qwen3_text_config(model: KnownModel) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_text(model), head_dim=128, max_position_embeddings=40_960)


def _llama_config(model: KnownModel) -> Any:
    from transformers import LlamaConfig

    positions = {"Llama-3.2": 131_072, "SmolLM2": 8_192}[model.family]
    return LlamaConfig(**_text(model), max_position_embeddings=positions)


_CONFIGS = {
    "Qwen3-VL": _qwen3_config,
    "Qwen2.5-VL": _qwen25_config,
    "InternVL3": _internvl_config,
    "Qwen3": _qwen3_text_config,
    "Llama-3.2": _llama_config,
    "SmolLM2": _llama_config,
}


def _text(model: KnownModel) -> dict[str, Any]:
    return dict(
        vocab_size=model.vocab,
        hidden_size=model.text.hidden,
        intermediate_size=model.text.intermediate,
        num_hidden_layers=model.text.layers,
        num_attention_heads=model.text.heads,
        num_key_value_heads=model.text.kv_heads or model.text.heads,
        tie_word_embeddings=model.tied,
    )


def _vision(model: KnownModel) -> dict[str, Any]:
    assert model.vision is not None, "it sees"
    return dict(
        hidden_size=model.vision.hidden,
        intermediate_size=model.vision.intermediate,
        depth=model.vision.layers,
        num_heads=model.vision.heads,
        out_hidden_size=model.text.hidden,
    )
