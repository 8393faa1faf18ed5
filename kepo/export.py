"""Write what a run has trained as a plain model, which transformers, vLLM and others load.

Adapters are merged into the model they were trained on. The folder gets weights, tokenizer,
processor, generation config and model card, and nothing of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kepo.config import from_mapping
from kepo.data.identity import model_identity
from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.flags import command_line
from kepo.models.reading import (
    base_of,
    hide_transformers_bars,
    load_encoder,
    read_config,
    read_merged,
)
from kepo.models.vlm import VLM
from kepo.run.card import merged_card
from kepo.run.checkpoint import PARTS, latest_checkpoint, load_state
from kepo.run.manifest import MANIFEST, new_folder, verify
from kepo.sections import ModelsConfig
from kepo.words import at_home


@dataclass(frozen=True)
class Export:
    """Settings of an export."""

    run: str
    """Folder of a run, whose newest checkpoint is taken, or of one of its checkpoints."""
    out: str
    """Folder to write, which must be empty or not there."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the weights that are written. None means that of the checkpoint's weights, or
    where it has adapters that of the model they are for."""


def export_model(run: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Write the policy of a run, or of one checkpoint, as a plain model; return the checkpoint.

    Raises KepoConfigError if ``out`` has files in it, KepoCheckpointError if there is no checkpoint
    that verifies, or if its adapters are for a model that is not here as it was. If anything fails,
    ``out`` is not there.
    """
    target = Path(out)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise KepoConfigError(f"out={str(out)!r} is a file or a link; expected a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise KepoConfigError(f"out={str(out)!r} has files in it; expected a new or empty folder")
    checkpoint = checkpoint_of(Path(run))
    policy, state = checkpoint / "policy", load_state(checkpoint)
    config = from_mapping(state["config"], str(checkpoint))
    if base_of(policy) is not None:
        refuse_other_base(checkpoint, state)
    stored = read_config(policy).dtype or torch.float32
    model = read_merged(policy, torch.float32)  # merging in 16 bits would lose most of an adapter
    model.to(getattr(torch, dtype) if dtype else stored)
    vlm = VLM(model.eval(), load_encoder(policy, model))
    if target.is_dir():
        os.rmdir(target)
    with new_folder(target.absolute()) as folder:
        vlm.save(folder)
        _write_card(policy, folder, config)
    return checkpoint


def checkpoint_of(run: Path) -> Path:
    """Return the newest checkpoint of a run's folder that verifies, or the checkpoint that the path
    itself is, or whose policy it is."""
    folder = run.parent if run.name == "policy" else run
    if (folder / MANIFEST).is_file():
        if (fault := verify(folder, PARTS)) is not None:
            raise KepoCheckpointError(f"{folder} is damaged: {fault}; give another checkpoint")
        return folder
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        raise KepoCheckpointError(
            f"{run} is no checkpoint and has none; expected the folder of a run (run_dir), or one "
            "of its checkpoints"
        )
    return newest


def refuse_other_base(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise KepoCheckpointError if the model that adapters belong to is not as it was."""
    base = base_of(folder / "policy")
    assert base is not None, "a checkpoint of adapters"
    before = state.get("inputs", {}).get("student")
    if before is None:
        print(f"{folder} has no digest of {base}: it is taken to be the model it was")
        return
    now = model_identity(base)
    if now != before:
        other = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        raise KepoCheckpointError(
            f"{folder} holds adapters for {base}, which has changed since: "
            f"{', '.join(other[:3])}; bring back the model that they were trained on"
        )


def _write_card(policy: Path, folder: Path, config: ModelsConfig) -> None:
    card = policy / "README.md"
    if card.is_file():
        text = merged_card(card.read_text(encoding="utf-8"), config)
        (folder / "README.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Run ``kepo export``."""
    [given] = command_line(
        Export,
        prog="kepo export",
        usage="RUN_OR_CHECKPOINT OUT [OPTIONS]",
        args=arguments,
        description=__doc__,
    )
    given = at_home(given, "run", "out")
    hide_transformers_bars()
    checkpoint = export_model(given.run, given.out, given.dtype)
    kind = json.loads((Path(given.out) / "config.json").read_text(encoding="utf-8"))["model_type"]
    print(f"{given.out}: {kind} of {checkpoint}")
