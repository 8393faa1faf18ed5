"""All settings of a run in one dataclass, which serves as documentation, YAML schema and command
line."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

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
    TaskConfig,
)
from kepo.words import expanded, guesses, is_address, sentence, typed

PRESETS = Path(__file__).parent / "presets"
RECIPES = "[RECIPE | PRESET ...] [OPTIONS]"
"""What commands take that read recipes: those and presets come before the flags."""
TOTAL = "total"  # in place of a reward's name: the weighted sum of them all
PATHS = ("student", "teacher", "train_data", "eval_data", "image_root", "run_dir")
"""Settings that are paths: a leading ~ is expanded to the home folder."""


@dataclass(frozen=True)
class Config(
    RunConfig,  # dataclass takes the fields of the last of these first
    OptimizerConfig,
    HintConfig,
    ObjectiveConfig,
    RewardConfig,
    SamplingConfig,
    TaskConfig,
    ModelsConfig,
    DataConfig,
):
    """Settings of KEPO: GRPO, distillation gated by a completion's quality, and hints where every
    sample fails."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in _typed(values, "Config").items():
            object.__setattr__(self, name, value)
        if self.reward_weights == Config.reward_weights:  # not set: 1 each, of however many
            object.__setattr__(self, "reward_weights", (1.0,) * len(self.rewards))

    @property
    def taught_by(self) -> dict[str, str]:
        """The teachers by the setting that names each; none if the run does not use them."""
        return self.teacher_paths if self.distils or self.hints else {}

    @property
    def local_teachers(self) -> dict[str, str]:
        """Those of them that the run's own processes hold."""
        return {name: path for name, path in self.taught_by.items() if not is_address(path)}

    @property
    def read_again(self) -> dict[str, str]:
        """The models that a resumed run reads again, by setting: local teachers, and the student as
        it began, where it is the base of adapters or the reference."""
        base = {"student": self.student} if self.lora_rank or self.kl_coef else {}
        return self.local_teachers | base

    @property
    def compared(self) -> dict[str, Any]:
        """The settings as a resumed run compares them: the learning rate's schedule is written
        out where it is None, since older runs have it written out, and the addresses of servers
        are left out, since the same model may be served at another."""
        form, end = self.decay
        values = dataclasses.asdict(self) | {"lr_schedule": form, "lr_end": end}
        if self.teacher is not None:
            values["teacher"] = _whose(self.teacher)
        values["teachers"] = tuple((value, _whose(name)) for value, name in self.teachers)
        return values


def _whose(teacher: str) -> str:
    return "a server's" if is_address(teacher) else teacher


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_limit",
        "eval_batch",
        "max_skipped_steps",
        *("log_completions_every", "report_to"),
        *("changed_inputs", "rank_timeout_minutes"),
        *("device", "sharding", "rollout_gather", "teacher_placement"),
        *("gradient_checkpointing", "attn_implementation", "liger_layers", "vllm_memory"),
        *("micro_batch", "micro_tokens", "rollout_batch", "rollout_tokens", "workspace_bytes"),
        *("share_prompts", "scores_on"),
        *("teacher_at_once", "teacher_timeout", "teacher_retries"),
    }
)
"""Settings that decide what a run writes down, or where and in what portions it computes."""


RENAMED = {"engine": "sampler"}
"""Old names of settings, which runs on disk may still use, and their new names."""


AS_BEFORE = frozenset(
    {"lr_schedule", "optimizer", "mini_batches", "kl_estimator", "delta", "teacher_temperature"}
    | {"sapo_temperature_pos", "sapo_temperature_neg", "logits_dtype", "grad_tol", "student_bits"}
    | {"teachers", "kl_bias_correction", "gate_side", "hint_for"}
    | {"distill_tokens", "error_threshold", "data_weight", "dynamic_reward"}
)
"""Settings whose defaults are what versions that did not have them did: a run that such a version
began is resumed with the defaults only."""


def load(*layers: str | Path) -> Config:
    """Build a Config from YAML files and presets (`presets()`); later layers override earlier ones.

    Each layer is a path to a YAML mapping, or a preset's name. A list of rewards that replaces
    another is said. KepoConfigError names unreadable files, unknown keys and wrong types.
    """
    values: dict[str, Any] = {}
    rewarded: str | Path = ""
    for layer in layers:
        given = read_layer(layer)
        if "rewards" in given:
            if values.get("rewards", given["rewards"]) != given["rewards"]:
                _say_replaced(rewarded, values["rewards"], layer, given["rewards"])
            if set(values.get("reward_weights", ())) == {1.0}:  # 1 each, of however many
                del values["reward_weights"]
            rewarded = layer
        values |= given
    return Config(**values)


def _say_replaced(
    earlier: str | Path, old: Sequence[str], later: str | Path, new: Sequence[str]
) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"rewards: {later} replaces {', '.join(old)}, which {earlier} gives, by "
            f"{', '.join(new)}: the later file or preset counts, and a flag over all",
            file=sys.stderr,
        )


def read_layer(layer: str | Path) -> dict[str, Any]:
    """Return the settings in one layer of ``load`` by name, each converted to its field's type."""
    otherwise = f"a preset, one of {', '.join(presets())}"
    if not str(layer):
        raise KepoConfigError(f"layer is an empty name; expected a YAML file or {otherwise}")
    path = presets().get(str(layer), Path(layer))
    words = read_mapping(path, otherwise=otherwise)
    return _typed(words, str(path))


def presets() -> dict[str, Path]:
    """Return the presets that come with the package, by name; each is a few lines that override
    defaults."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def from_mapping(values: dict[str, Any], source: str) -> Config:
    """Build a Config from plain values, each checked against its field's type; lists become tuples.

    Settings of a run on disk may have old names (``RENAMED``), which are read as the new ones.
    """
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    if values.get("overlong_buffer") and "overlong" not in values.get("rewards", ()):
        # It was no reward then, and counted by itself.
        values["rewards"] = [*values.get("rewards", Config.rewards), "overlong"]
        values["reward_weights"] = [*values.get("reward_weights", Config.reward_weights), 1.0]
    return Config(**_typed(values, source))


def _typed(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Convert ``values`` to the types of the fields' annotations, and expand ~ in paths."""
    known = _annotations()
    unknown = {str(name): value for name, value in values.items() if name not in known}
    if unknown:
        advice = "; ".join(_instead(name, unknown[name]) for name in [*unknown][:3])
        raise KepoConfigError(
            f"{source}: unknown keys {[*unknown]}; {advice} (kepo train --help lists all)"
        )
    found: dict[str, Any] = {}
    for name, value in values.items():
        try:
            found[name] = typed(value, known[name])
            if name in PATHS and found[name] != getattr(Config, name):  # "" and None: not set
                found[name] = expanded(found[name])
            if name == "teachers":
                found[name] = tuple((value, expanded(path)) for value, path in found[name])
        except ValueError as error:
            raise KepoConfigError(f"{source}: {name}={sentence(value, error)}") from error
    return found


def _instead(name: str, value: Any) -> str:
    """Return what to write instead of a key that is no setting."""
    if name in RENAMED:
        return f"{name} is now called {RENAMED[name]}"
    if isinstance(value, dict):
        return f"{name} is a block, but recipes are flat: give its settings without it"
    return f"{name}: {guesses(name, _annotations())}"


@cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(Config, include_extras=True)
