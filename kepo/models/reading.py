"""Models and encoders from disk, in the layout of the released ones.

Only safetensors are read, and no code that a folder brings is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from kepo.errors import KepoCheckpointError, KepoConfigError, KepoError
from kepo.models import conventions, tensors
from kepo.models.encoding import Encoder
from kepo.models.processors import image_processor_class, without_broken_torchvision
from kepo.models.vision import check_reads_types

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""A pattern for ``name`` or ``owner/name``."""
NO_CODE: dict[str, Any] = dict(trust_remote_code=False)
"""Arguments for every function of transformers that could run a model folder's code, or ask to."""


def read_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Read the model at a folder or Hub name, on the CPU unless ``settings``, which are
    from_pretrained's, say otherwise.

    Raises KepoCheckpointError if it is not there or not a Qwen-VL model, brings code of its own,
    or if its weights are not all there, of the right shapes and finite, in safetensors.
    """
    without_broken_torchvision()
    from transformers import AutoModelForImageTextToText

    config = read_config(path)
    if (base := base_of(path)) is not None:
        return _adapted(path, read_model(base, dtype, **settings))
    quantized = bool(getattr(config, "quantization_config", None))
    tensors.check_files(path, quantized)
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **NO_CODE,
            **settings,
        )
    except ImportError as error:
        raise KepoConfigError(f"{path} cannot be loaded as asked: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of broken files its many readers raise anything
        raise _unreadable(path, error) from error
    tensors.check_loaded(path, found)
    tensors.check_values(path, model)
    check_reads_types(model)
    return model


def blank_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Return the same model on the CPU, still empty: memory that is not touched is not taken."""
    without_broken_torchvision()
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        config = read_config(path)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **NO_CODE, **settings)
    model.to_empty(device="cpu").tie_weights()
    if base_of(path) is not None:
        peft = _peft(path)
        adapters = peft.PeftConfig.from_pretrained(path)
        with tensors.quiet_peft():
            model = peft.get_peft_model(model, adapters).get_base_model()
    return model


def read_config(path: str | Path) -> Any:
    """Read a Qwen-VL model's config at a folder or Hub name; KepoCheckpointError if it is none."""
    without_broken_torchvision()
    from transformers import AutoConfig

    whole = base_of(path) or path
    try:
        config = AutoConfig.from_pretrained(whole, **NO_CODE)
    except Exception as error:
        raise _unreadable(path, error) from error
    if getattr(config, "image_token_id", None) is None:
        raise KepoCheckpointError(
            f"{path}: {type(config).__name__} has no image_token_id; expected the config of a "
            "Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
        )
    if (other := getattr(config, "transformers_weights", None)) is not None:
        raise KepoCheckpointError(
            f"{path}: config.json says transformers_weights={other!r}; expected it "
            f"left out: weights are read from {tensors.WHOLE}, or the files of its index"
        )
    conventions.check_positions(path, config)
    conventions.check_padding(path, config)
    return config


def load_encoder(path: str | Path, model: Any) -> Encoder:
    """Load tokenizer and image processor at a folder or Hub name, for that model.

    Raises KepoCheckpointError if one is missing, lacks what we need of it, or is another model's.
    """
    encoder = encoder_of(path, model.config)
    conventions.check_head(path, model, encoder.tokenizer)
    return encoder


def encoder_of(path: str | Path, config: Any) -> Encoder:
    """Load an encoder as `load_encoder` does, for a model of which only the config is at hand."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
        image_processor = _image_processor(path)
    except KepoError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    for name in ("pad_token_id", "eos_token_id", "chat_template"):
        if getattr(tokenizer, name, None) is None:
            raise KepoCheckpointError(f"{path}: the tokenizer has no {name}; set it and save")
    conventions.check_template(path, tokenizer, config.image_token_id)
    conventions.check_pictures(path, image_processor, config)
    ends = conventions.end_ids(base_of(path) or path, tokenizer, config)
    return Encoder(
        tokenizer,
        image_processor,
        config.image_token_id,
        end_ids=ends,
        control_ids=conventions.control_ids(tokenizer, config, ends),
        opened=conventions.opened_by(path, tokenizer),
        positions=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def base_of(path: str | Path) -> str | None:
    """Return the model that a folder of adapters belongs to; None for a whole model.

    Raises KepoCheckpointError if the folder does not name one, or names adapters again.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KepoCheckpointError(f"{file} cannot be read: {error!r}") from error
    if not isinstance(base, str) or not base or (Path(base) / "adapter_config.json").is_file():
        raise KepoCheckpointError(
            f"{file} says base_model_name_or_path={base!r}; expected the folder or Hub "
            "name of the whole model whose adapters they are"
        )
    return base


def hide_transformers_bars() -> None:
    """Hide the bars that transformers shows while it loads and saves; kepo's own bar stays."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _adapted(path: str | Path, model: Any) -> Any:
    """Return the model with the adapters of a folder in it."""
    return tensors.with_saved_adapters(_peft(path), model, Path(path)).get_base_model()


def read_merged(path: str | Path, dtype: torch.dtype) -> Any:
    """Read a model as `read_model` does, and merge the adapters of a folder into its weights."""
    if (base := base_of(path)) is None:
        return read_model(path, dtype)
    peft, model = _peft(path), read_model(base, dtype)
    return tensors.with_saved_adapters(peft, model, Path(path)).merge_and_unload()


def _peft(path: str | Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise KepoConfigError(
            f"{path} holds adapters, which need peft; pip install 'kepo[lora]'"
        ) from error
    return peft


def _image_processor(path: str | Path) -> Any:
    kind = image_processor_class()
    stated = kind.get_image_processor_dict(path)[0].get("image_processor_type")
    if stated is not None and not re.match(r"Qwen\w*VLImageProcessor", stated):
        raise KepoCheckpointError(
            f"{path}: preprocessor_config.json names the image processor {stated}; expected "
            "Qwen2VLImageProcessor, which belongs to the Qwen-VL models that kepo can train"
        )
    return kind.from_pretrained(path)


def _unreadable(path: str | Path, error: Exception) -> KepoCheckpointError:
    if "trust_remote_code" in str(error):
        return KepoCheckpointError(
            f"{path} brings code of its own (auto_map), which is never run here; "
            "expected a model that transformers knows by itself"
        )
    said = " ".join(str(error).split()) or type(error).__name__
    place = Path(path)
    if not place.is_dir():
        kind = "it is no folder" if place.exists() else "there is no such folder"
        # transformers takes it for a name on the Hub, and may have tried to reach it.
        hub = f"; as a name on the Hub: {said}" if HUB_NAME.fullmatch(str(path)) else ""
        return KepoCheckpointError(
            f"{path}: cannot load a vision-language model from it: {kind}{hub}; expected the "
            "folder of one, or its name on the Hub"
        )
    return KepoCheckpointError(
        f"{path}: cannot load a vision-language model from it: {said}; expected "
        "config.json, *.safetensors, tokenizer files and preprocessor_config.json"
    )
