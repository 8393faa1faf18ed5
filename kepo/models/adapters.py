"""Low-rank adapters on the language model (LoRA, Hu et al. 2021), held by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kepo.errors import KepoConfigError
from kepo.models.families.registry import family_of
from kepo.models.tensors import quiet_peft, with_saved_adapters


def with_adapters(model: Any, rank: int, alpha: float, seed: int, saved: Path | None = None) -> Any:
    """Put adapters into ``model``, in place, and freeze the rest; return peft's wrapper, which
    saves them.

    saved: the folder they were saved in; None means new ones, that change nothing yet, the same for
    the same ``seed``. Adapters are float32 whatever the model is. Raises KepoConfigError without
    peft, KepoCheckpointError if ``saved`` has no safetensors or does not fit.
    """
    try:
        import peft
    except ImportError as error:
        raise KepoConfigError(f"lora_rank={rank} needs peft; pip install 'kepo[lora]'") from error

    if saved is not None:
        return with_saved_adapters(peft, model, saved, is_trainable=True)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # what trains is what sampled
        target_modules=family_of(model.config).adapted,
    )
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)
