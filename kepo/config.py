"""Every setting of a run, in one dataclass: documentation, YAML schema and command line at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.disk.yaml_file import read_mapping
from kepo.errors import KepoConfigError
from kepo.sections import (
    DataConfig,
    HintConfig,
    ModelsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)
from kepo.words import expanded, sentence, typed

PRESETS = Path(__file__).parent / "presets"
TOTAL = "total"  # in place of a reward's name: the weighted sum of them all
PATHS = ("student", "teacher", "train_data", "eval_data", "image_root", "run_dir")
"""Settings in which a leading ~ stands for the home folder."""


@dataclass(frozen=True)
class Config(
    RunConfig,  # dataclass takes the fields of the last of these first
    OptimizerConfig,
    HintConfig,
    ObjectiveConfig,
    RewardConfig,
    SamplingConfig,
    ModelsConfig,
    DataConfig,
):
    """KEPO: GRPO, distillation gated by the quality of a completion, hints where every sample
    fails."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in _typed(values, "Config").items():
            object.__setattr__(self, name, value)


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_limit",
        "eval_batch",
        "max_skipped_steps",
        "log_completions_every",
        *("changed_inputs", "rank_timeout_minutes"),
        *("device", "sharding", "rollout_gather", "teacher_placement"),
        *("gradient_checkpointing", "attn_implementation", "liger_layers", "vllm_memory"),
        *("micro_batch", "rollout_batch", "rollout_tokens", "workspace_bytes"),
    }
)
"""Settings that decide what a run writes down, or where and in what portions it computes."""


RENAMED = {"engine": "sampler"}
"""Old names of settings, which runs on disk may have."""


def load(*layers: str | Path) -> Config:
    """A Config from YAML files and presets (`presets()`), where later ones override earlier ones.

    Each layer is a path to a YAML mapping, or a preset's name. KepoConfigError names unreadable
    files, unknown keys and wrong types.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= read_layer(layer)
    return Config(**values)


def read_layer(layer: str | Path) -> dict[str, Any]:
    """The settings that one layer of ``load`` has, by name, each of its field's type."""
    path = presets().get(str(layer), Path(layer))
    words = read_mapping(path, otherwise=f"a preset, one of {', '.join(presets())}")
    return _typed(words, str(path))


def presets() -> dict[str, Path]:
    """The methods that come with the package, by name: each a few lines over the defaults."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def from_mapping(values: dict[str, Any], source: str) -> Config:
    """A Config from plain values, each checked against its field's type; lists become tuples.

    Settings of a run on disk may have old names (``RENAMED``), which are read as the new ones.
    """
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    return Config(**_typed(values, source))


def _typed(values: dict[str, Any], source: str) -> dict[str, Any]:
    """``values`` as the fields' annotations want them, paths with their ~ expanded."""
    known = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        new = "".join(f"{a} is now called {RENAMED[a]}; " for a in unknown if a in RENAMED)
        raise KepoConfigError(f"{source}: unknown keys {unknown}; {new}known are {sorted(known)}")
    found: dict[str, Any] = {}
    for name, value in values.items():
        wanted = known[name]
        try:
            found[name] = typed(value, wanted)
            if name in PATHS and found[name] != getattr(Config, name):  # "" and None: not set
                wanted = "a path"
                found[name] = expanded(found[name])
        except ValueError as error:
            raise KepoConfigError(f"{source}: {name}={sentence(value, wanted, error)}") from error
    return found
