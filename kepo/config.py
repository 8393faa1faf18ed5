"""Every setting of a run, in one dataclass: documentation, YAML schema and command line at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.errors import KepoConfigError
from kepo.rewards import REWARDS

TOTAL = "total"  # as gate_reward: the weighted sum of all rewards


@dataclass(frozen=True)
class Config:
    """KEPO: GRPO, distillation gated by the quality of a completion, hints where every sample
    fails."""

    # ---- what is trained on what ----
    student: str = ""
    """Folder or Hub name of the vision-language model to train."""
    teacher: str | None = None
    """Folder or Hub name of the frozen teacher with the same tokenizer. None = plain GRPO."""
    train_data: str = ""
    """Folder in OmniMedVQA's layout."""
    train_modalities: tuple[str, ...] | None = None
    """Train on these modalities only. None = all."""
    eval_data: str | None = None
    """Folder in OmniMedVQA's layout for greedy evaluation, all modalities. None = no evaluation."""
    run_dir: str = "runs/kepo"
    """Where checkpoints, metrics.jsonl and curves.png go. An existing run there is resumed."""
    dtype: str = "float32"
    """Of student and teacher: float32, bfloat16 or float16."""
    device: str = "cpu"
    """Where student and teacher live, as torch spells it."""

    # ---- how much ----
    steps: int = 200
    """Optimiser steps."""
    prompts_per_step: int = 16
    """Questions per step; each is answered num_generations times."""
    num_generations: int = 8
    """Completions per question, the group in which advantages are relative."""
    micro_batch: int = 32
    """Completions per forward and backward; gradients accumulate over the step."""
    rollout_batch: int = 256
    """Completions generated at once, at most."""
    max_completion_length: int = 128
    """Tokens per completion, at most."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    seed: int = 0
    """Of data order and sampling. The same seed on the same machine gives the same bits."""

    # ---- optimiser ----
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps of linear rise to lr."""
    lr_end: float = 1.0
    """Share of lr left at the last step, reached in a straight line. 1 = constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: int = 3
    """So many steps in a row with a non-finite loss or gradient are skipped; then the run stops."""

    # ---- sampling ----
    sampling_temperature: float = 1.0
    """Of generation. Other than temperature, it makes the sampled law differ from the scored
    one."""
    top_p: float = 1.0
    """Nucleus of generation. 1 = off."""

    # ---- rewards ----
    rewards: tuple[str, ...] = ("accuracy", "format")
    """Names from kepo.rewards.REWARDS."""
    reward_weights: tuple[float, ...] = (1.0, 1.0)
    """Their weights in the total reward, from which advantages are made."""

    # ---- policy term (GRPO) ----
    epsilon_low: float = 0.2
    """The ratio is clipped below 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above 1 + epsilon_high."""
    kl_coef: float = 0.0
    """Weight of the k3 penalty towards the start point; 0 = absent, and no reference model is
    kept."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    policy_reduction: str = "sequence_mean"
    """token_mean, sequence_mean or sum."""
    temperature: float = 1.0
    """Softmax temperature of log-probabilities and divergence."""

    # ---- distillation ----
    distill_coef: float = 1.0
    """Weight of the divergence from the teacher. 0 = none."""
    beta: float = 0.5
    """0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD."""
    gate_reward: str | None = "accuracy"
    """The reward the quality gate reads: one of rewards, or total. None = distil on everything."""
    gate_threshold: float = 1.0
    """The gate is open where that reward is at least this."""
    distill_reduction: str = "token_mean"
    """token_mean, sequence_mean or sum, over the open sequences."""

    # ---- hints ----
    num_hinted: int = 2
    """Failures of a failed group that hinted successes may replace. 0 = no hints."""
    max_attempts: int = 5
    """Rounds of sampling with a hint."""
    hint_reward: str = "accuracy"
    """A group has failed when no sample of it reaches hint_threshold on this reward."""
    hint_threshold: float = 1.0
    """See hint_reward."""
    hint_with_answer: bool = False
    """Tell the teacher the right letter when it writes the hint."""

    # ---- losses ----
    impl: str = "auto"
    """Back-end of the fused losses: auto, triton, cpu or torch."""
    workspace_bytes: int | None = None
    """Memory for the logits of one chunk. None = the library's default."""

    # ---- bookkeeping ----
    save_every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    eval_every: int = 0
    """Steps between evaluations. 0 = before the first and after the last step only."""
    eval_limit: int | None = None
    """Questions per modality in an evaluation. None = all."""
    eval_batch: int = 64
    """Questions answered at once in an evaluation."""

    @property
    def distils(self) -> bool:
        return self.teacher is not None and self.distill_coef > 0

    @property
    def hints(self) -> bool:
        return self.teacher is not None and self.num_hinted > 0


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_limit",
        "eval_batch",
        "max_skipped_steps",
    }
)
"""Settings that decide what a run writes down, not what each step computes."""


def load_yaml(path: str | Path) -> Config:
    """A Config from a YAML mapping; KepoConfigError names unknown keys and wrong types."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KepoConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise KepoConfigError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise KepoConfigError(f"config file {path} holds {content!r}; expected `key: value` lines")
    return from_mapping(content, str(path))


def from_mapping(values: dict[str, Any], source: str) -> Config:
    """A Config from plain values, each checked against its field's type; lists become tuples."""
    known = {field.name: field for field in dataclasses.fields(Config)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise KepoConfigError(f"{source}: unknown keys {unknown}; known are {sorted(known)}")
    return Config(**{name: _typed(name, value, source) for name, value in values.items()})


def check(config: Config) -> None:
    """Refuse, by name, what cannot work: before any model is loaded."""
    _ranges(config)
    _names(config)
    if not config.student:
        _refuse("student is not set; give the folder of a vision-language model")
    if not config.train_data:
        _refuse("train_data is not set; give a folder in OmniMedVQA's layout")
    for name in ("train_data", "eval_data"):
        folder = getattr(config, name)
        if folder is not None and not (Path(folder) / "QA_information").is_dir():
            _refuse(
                f"{name}={folder!r}: no folder QA_information in it; expected OmniMedVQA's layout"
            )
    if config.num_hinted > config.num_generations:
        _refuse(
            f"num_hinted={config.num_hinted} is more than num_generations="
            f"{config.num_generations}: a group has no more samples to replace"
        )
    if config.teacher is None:
        needs = [("num_hinted", config.num_hinted, 0), ("gate_reward", config.gate_reward, None)]
        needs += [("distill_coef", config.distill_coef, 0.0)]
        for name, value, off in needs:
            if value != off:
                _refuse(f"{name}={value!r} needs a teacher; set teacher, or {name} to {off}")


def _ranges(config: Config) -> None:
    def bound(names: str, holds: Any, expected: str) -> None:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                _refuse(f"{name}={value!r}; expected {expected}")

    bound(
        "steps prompts_per_step micro_batch rollout_batch max_completion_length max_attempts "
        "save_every keep_checkpoints eval_limit eval_batch workspace_bytes",
        lambda x: x >= 1,
        "a number >= 1",
    )
    bound("num_generations", lambda x: x >= 2, "at least 2: advantages are relative to a group")
    bound(
        "num_hinted warmup_steps weight_decay kl_coef distill_coef eval_every epsilon_high "
        "max_skipped_steps seed",
        lambda x: x >= 0,
        "a number >= 0",
    )
    bound("lr max_grad_norm sampling_temperature temperature", lambda x: x > 0, "a number > 0")
    bound("top_p", lambda x: 0 < x <= 1, "a number in (0, 1]")
    bound("beta epsilon_low lr_end", lambda x: 0 <= x <= 1, "a number in [0, 1]")
    bound("entropy_coef gate_threshold hint_threshold", lambda x: True, "a finite number")


def _names(config: Config) -> None:
    def choose(name: str, choices: Sequence[Any]) -> None:
        value = getattr(config, name)
        if value not in choices:
            _refuse(f"{name}={value!r}; expected one of {', '.join(map(str, choices))}")

    choose("dtype", ("float32", "bfloat16", "float16"))
    choose("impl", ("auto", "triton", "cpu", "torch"))
    for name in ("policy_reduction", "distill_reduction"):
        choose(name, ("token_mean", "sequence_mean", "sum"))
    if not config.rewards or len(set(config.rewards)) != len(config.rewards):
        _refuse(f"rewards={config.rewards!r}; expected at least one name, each once")
    for name in config.rewards:
        if name not in REWARDS:
            _refuse(f"rewards has {name!r}; known are {', '.join(REWARDS)}")
    if len(config.reward_weights) != len(config.rewards):
        _refuse(
            f"reward_weights has {len(config.reward_weights)} values for "
            f"{len(config.rewards)} rewards"
        )
    if not all(map(math.isfinite, config.reward_weights)):
        _refuse(f"reward_weights={config.reward_weights!r}; expected finite numbers")
    if config.gate_reward is not None:
        choose("gate_reward", (*config.rewards, TOTAL))
    if config.num_hinted:
        choose("hint_reward", config.rewards)


def _refuse(message: str) -> None:
    raise KepoConfigError(f"config: {message}")


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def _typed(name: str, value: Any, source: str) -> Any:
    """``value`` as the field's annotation wants it; whole numbers may stand for floats."""
    field = next(field for field in dataclasses.fields(Config) if field.name == name)
    wanted = str(field.type)
    optional = wanted.endswith(" | None")
    plain = wanted.removesuffix(" | None")
    if value is None and optional:
        return None
    if plain.startswith("tuple["):
        element = plain.removeprefix("tuple[").removesuffix(", ...]")
        if isinstance(value, (list, tuple)) and all(_is(x, element) for x in value):
            return tuple(float(x) if element == "float" else x for x in value)
    elif _is(value, plain):
        return float(value) if plain == "float" else value
    raise KepoConfigError(f"{source}: {name}={value!r}; expected {wanted}")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and isinstance(value, bool) == (kind == "bool")
