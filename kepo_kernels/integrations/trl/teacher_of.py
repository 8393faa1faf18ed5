"""The teacher of a trainer: loaded if it is a name, and refused if it cannot teach this student."""

from typing import Any

import torch
from torch import nn
from trl.trainer.utils import create_model_from_path

from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import innermost, output_layer

PADDING = 1024
"""The most rows by which vocabularies differ that hold the same tokens, padded differently: the
models of Qwen2.5 have 151,936 or 152,064."""


def teacher_of(teacher_model: Any, trainer: Any, settings: dict[str, Any]) -> Any:
    """Return a trainer's teacher; a name is loaded with these settings, of which dtype may be text.

    Raises KepoInputError if there is no such model, if it is the student itself or has no LM head,
    and if its tokens are not those of the student.
    """
    if isinstance(teacher_model, str):
        model = _loaded(teacher_model, settings)
        _same_tokens(teacher_model, _tokenizer(trainer))
    elif isinstance(teacher_model, nn.Module):
        model = teacher_model
    else:
        raise KepoInputError(
            f"teacher_model is a {type(teacher_model).__name__}; expected a model of "
            "transformers, or its name or folder"
        )
    if innermost(model) is innermost(trainer.model):
        raise KepoInputError(
            "teacher_model is the student itself, which would be compared with itself; "
            "expected another model, or a copy: copy.deepcopy(model)"
        )
    output_layer(model)  # raises where there is none
    _same_size(model, trainer)
    return model


def _loaded(name: str, settings: dict[str, Any]) -> Any:
    if name.startswith(("http://", "https://")):
        raise KepoInputError(
            f"teacher_model is the address {name!r}; expected a model, or its name or "
            "folder: teachers on a server are for `kepo train` and for TRL's own trainers"
        )
    dtype = settings.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        settings = settings | {"dtype": getattr(torch, dtype)}
    try:
        return create_model_from_path(name, **settings)
    except (OSError, ValueError) as error:
        raise KepoInputError(
            f"teacher_model is {name!r}, and no model can be loaded from it; expected a "
            f"folder of transformers or a name on the Hub ({error})"
        ) from error


def _tokenizer(trainer: Any) -> Any:
    processor = trainer.processing_class
    return getattr(processor, "tokenizer", processor)


def _same_tokens(name: str, own: Any) -> None:
    """Refuse a teacher some of whose ids stand for other tokens; one without a tokenizer passes."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return
    meaning = {place: token for token, place in theirs.get_vocab().items()}
    for token, place in sorted(own.get_vocab().items(), key=lambda pair: pair[1]):
        if meaning.get(place, token) != token:
            raise KepoInputError(
                f"teacher_model is {name!r}, for which id {place} is {meaning[place]!r} "
                f"where it is {token!r} for the student; expected a teacher with the same tokens"
            )


def _same_size(teacher: Any, trainer: Any) -> None:
    """Refuse a vocabulary that lacks tokens, or differs by more than padding.

    Sizes are read from the configs: a weight that is sharded shows none.
    """
    inner: list[Any] = [innermost(model) for model in (teacher, trainer.model)]
    rows, own = (model.config.get_text_config().vocab_size for model in inner)
    tokens = len(_tokenizer(trainer))
    if rows < tokens:
        raise KepoInputError(
            f"teacher_model has a vocabulary of {rows}, and processing_class has {tokens} "
            "tokens; expected a teacher that knows them all"
        )
    if abs(rows - own) > PADDING:
        raise KepoInputError(
            f"teacher_model has a vocabulary of {rows}, and the student one of {own}; "
            f"expected the same tokens, which differ by at most {PADDING} rows of padding"
        )
