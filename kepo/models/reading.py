"""Models and encoders from disk, in the layout of the released ones.

Only safetensors are read, and no code that a folder brings is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kepo.data.network import HUB_NAME, look_for_hub
from kepo.errors import KepoCheckpointError, KepoConfigError, KepoError
from kepo.models import conventions, tensors
from kepo.models.encoding import Encoder
from kepo.models.families.processors import without_broken_torchvision
from kepo.models.families.registry import family_of
from kepo.sections import PicturesConfig

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""The settings, and what Qwen's image processors call them; all are pixels, width times height."""
NO_CODE: dict[str, Any] = dict(trust_remote_code=False)
"""Arguments for every function of transformers that could run a model folder's code, or ask to."""


def read_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Read the model at a folder or Hub name, on the CPU unless ``settings``, which are
    from_pretrained's, say otherwise.

    Raises KepoCheckpointError if it is not there or of no family, brings code of its own,
    or if its weights are not all there, of the right shapes and finite, in safetensors.
    """
    config = read_config(path)
    if (base := base_of(path)) is not None:
        return _adapted(path, read_model(base, dtype, **settings))
    quantized = bool(getattr(config, "quantization_config", None))
    tensors.check_files(path, quantized)
    try:
        model, found = auto_class(config).from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **NO_CODE,
            **settings,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of broken files its many readers raise anything
        refused = refused_attention(path, settings.get("attn_implementation"), error)
        if refused is not None:
            raise refused from error
        if isinstance(error, ImportError):
            raise KepoConfigError(f"{path} cannot be loaded as asked: {error}") from error
        raise _unreadable(path, error) from error
    tensors.check_loaded(path, found)
    tensors.check_values(path, model)
    family_of(config).check(model)
    return model


def refused_attention(
    path: str | Path, attention: str | None, error: Exception
) -> KepoConfigError | None:
    """Return the error of a model that transformers does not build with this attn_implementation;
    None if its own error is about something else."""
    said = " ".join(str(error).split())
    words = ("attn", "FlashAttention", "attention implementation", "kernels")
    if attention is None or not any(word in said for word in words):
        return None
    reason = said.partition(". ")[0].rstrip(".")
    return KepoConfigError(
        f"attn_implementation={attention!r}: {path} cannot be computed with it: {reason}; expected "
        "sdpa, eager, or another that is installed and that transformers has for this model"
    )


def blank_model(path: str | Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Return the same model on the CPU, still empty: memory that is not touched is not taken."""
    with torch.device("meta"):
        config = read_config(path)
        model = auto_class(config).from_config(config, dtype=dtype, **NO_CODE, **settings)
    model.to_empty(device="cpu").tie_weights()
    if base_of(path) is not None:
        peft = _peft(path)
        adapters = peft.PeftConfig.from_pretrained(path)
        with tensors.quiet_peft():
            model = peft.get_peft_model(model, adapters).get_base_model()
    return model


def auto_class(config: Any) -> Any:
    """Return the auto class of transformers that loads the family of a config."""
    without_broken_torchvision()
    import transformers

    return getattr(transformers, family_of(config).loads)


def read_config(path: str | Path) -> Any:
    """Read a model's config at a folder or Hub name; KepoCheckpointError if it is of no family."""
    without_broken_torchvision()
    from transformers import AutoConfig

    whole = base_of(path) or path
    look_for_hub(whole)
    try:
        config = AutoConfig.from_pretrained(whole, **NO_CODE)
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        family_of(config)
    except LookupError as error:
        raise KepoCheckpointError(f"{path} {error.args[0]}") from error
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

    family = family_of(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
        pictures = family.pictures(path, config, tokenizer) if family.pictures else None
    except KepoError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    for name in ("pad_token_id", "eos_token_id", "chat_template"):
        if getattr(tokenizer, name, None) is None:
            raise KepoCheckpointError(f"{path}: the tokenizer has no {name}; set it and save")
    sees = pictures is not None
    conventions.check_template(path, tokenizer, pictures.token if pictures else None)
    ends = conventions.end_ids(base_of(path) or path, tokenizer, config, sees)
    return Encoder(
        tokenizer,
        pictures,
        end_ids=ends,
        control_ids=conventions.control_ids(tokenizer, family.marks(config, tokenizer), ends),
        opened=conventions.opened_by(path, tokenizer, sees),
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


def resize_pictures(encoder: Encoder, config: PicturesConfig, path: str) -> Encoder:
    """Let an encoder resize pictures as the settings say, and return it; what they leave open stays
    as the model's preprocessor_config.json has it.

    A processor keeps a picture's shape and rounds its sides to whole tokens, so the pixels may miss
    the bounds by that rounding. path: the model, for messages. Raises KepoConfigError if its
    pictures cannot be resized so.
    """
    wanted: dict[str, int | None] = {setting: getattr(config, setting) for setting in EDGES}
    given = {setting: value for setting, value in wanted.items() if value is not None}
    if not given:
        return encoder
    name, processor = next(iter(given)), encoder.image_processor
    size = dict(getattr(processor, "size", None) or {})
    if not all(edge in size for edge in EDGES.values()):
        raise KepoConfigError(
            f"{name}={given[name]}: {path} does not resize pictures by their number of pixels; "
            "leave it out"
        )
    edges = {edge: given.get(setting) or size[edge] for setting, edge in EDGES.items()}
    least, most = edges["shortest_edge"], edges["longest_edge"]
    token = (processor.patch_size * processor.merge_size) ** 2
    if most < token:
        raise KepoConfigError(
            f"max_pixels={most} is less than the {token} pixels of one token of {path}; give more"
        )
    if least > most:
        own = [setting for setting in EDGES if setting not in given]
        says = f" ({own[0]} as its preprocessor_config.json says)" if own else ""
        raise KepoConfigError(
            f"{name}={given[name]}: the smallest picture of {path} would have {least} pixels, "
            f"the largest {most}{says}; expected min_pixels <= max_pixels, so set both"
        )
    processor.size = type(processor.size)(**edges)
    return encoder


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
        hub = (
            f"; as a name on the Hub: {said.partition('. ')[0]}"
            if HUB_NAME.fullmatch(str(path))
            else ""
        )
        return KepoCheckpointError(
            f"{path}: cannot load a model from it: {kind}{hub}; expected the "
            "folder of one, or its name on the Hub"
        )
    return KepoCheckpointError(
        f"{path}: cannot load a model from it: {said}; expected "
        "config.json, *.safetensors, tokenizer files and, if it sees, preprocessor_config.json"
    )
