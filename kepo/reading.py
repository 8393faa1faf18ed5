"""Models and encoders from disk, in the layout of the released ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kepo.encoding import Encoder
from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.processors import image_processor_class, without_broken_torchvision


def read_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """The model at a folder or Hub name, on the CPU unless ``settings`` say otherwise; they are
    from_pretrained's. Raises KepoCheckpointError if it is not there or not a Qwen-VL model."""
    without_broken_torchvision()
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **settings)
    except ImportError as error:
        raise KepoConfigError(f"{path} cannot be loaded as asked: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if getattr(model.config, "image_token_id", None) is None:
        raise KepoCheckpointError(
            f"VLM.load: {type(model).__name__} has no image_token_id in its config; "
            "expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
        )
    return model


def blank_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """The same model on the CPU with nothing in it yet: memory that is not touched is not taken."""
    without_broken_torchvision()
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **settings)
    model.to_empty(device="cpu").tie_weights()
    return model


def load_encoder(path: str | Path, model: Any) -> Encoder:
    """Tokenizer and image processor at a folder or Hub name, for that model.

    Raises KepoCheckpointError if one is missing or lacks what we need of it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = image_processor_class().from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    for name in ("pad_token_id", "eos_token_id", "chat_template"):
        if getattr(tokenizer, name, None) is None:
            raise KepoCheckpointError(f"VLM.load: the tokenizer has no {name}; set it and save")
    return Encoder(tokenizer, image_processor, model.config.image_token_id)


def own_progress_only() -> None:
    """Keep transformers' bars for loading and saving out from between the lines of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _unreadable(path: str | Path, error: Exception) -> KepoCheckpointError:
    return KepoCheckpointError(
        f"VLM.load: cannot load a vision-language model from {path}: {error}; expected "
        "config.json, *.safetensors, tokenizer files and preprocessor_config.json"
    )
