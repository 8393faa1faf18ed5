"""Refusing, by name, settings that cannot work: before any model is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from kepo.config import TOTAL, Config
from kepo.data.load import layout_of
from kepo.distributed.processes import launched
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.device import known_device
from kepo.models.workspace import check_workspace
from kepo.tasks.rewards import REWARDS

LARGEST = 1e30
"""A setting, at most: ten of it, as AdamW takes of lr in its first step, are finite in float32."""


def check(config: Config) -> None:
    """Raise KepoConfigError for the first setting that is out of range, unknown or at odds with
    another, with the data or with this machine."""
    check_settings(config)
    for name in ("train_data", "eval_data"):
        folder = getattr(config, name)
        if folder is not None:
            try:
                layout_of(folder)
            except KepoDataError as error:
                _refuse(f"{name}={folder!r}: {error}")
    _machine(config)
    check_workspace(config)


def check_settings(config: Config) -> None:
    """The part of ``check`` that looks at nothing but the settings."""
    _ranges(config)
    _names(config)
    if not config.student:
        _refuse("student is not set; give the folder of a vision-language model")
    if not config.train_data:
        _refuse("train_data is not set; give a folder in OmniMedVQA's layout, or see --help")
    if config.eval_share and config.eval_data is not None:
        _refuse(f"eval_share={config.eval_share} and eval_data are two evaluations; give one")
    if config.hints and config.num_hinted > config.num_generations:
        _refuse(
            f"num_hinted={config.num_hinted} is more than num_generations="
            f"{config.num_generations}: a group has no more samples to replace"
        )
    if config.dtype != "float32" and config.sharding == "none" and not config.lora_rank:
        _refuse(
            f"dtype={config.dtype!r} would keep the trained weights in 16 bits, where steps of "
            f"lr={config.lr} vanish; set sharding: fsdp2 (in one process too), which keeps them in "
            "float32 and computes in dtype, or lora_rank"
        )
    if config.teacher_bits is not None and config.teacher_placement != "copy":
        _refuse(
            f"teacher_bits={config.teacher_bits} and teacher_placement="
            f"{config.teacher_placement!r}: a quantised teacher is a copy in every process"
        )
    if config.sampler == "vllm" and config.lora_rank:
        _refuse("sampler='vllm' takes whole weights, not adapters; set lora_rank: 0")
    if config.sampler == "vllm" and not 0.01 <= config.sampling_temperature <= 2:
        _refuse(
            f"sampling_temperature={config.sampling_temperature}; sampler='vllm' takes one in "
            "[0.01, 2]"
        )
    if config.rollout_batch < config.num_generations:
        _refuse(
            f"rollout_batch={config.rollout_batch} is less than num_generations="
            f"{config.num_generations}, and the completions of a question are generated at once"
        )
    flash = (config.attn_implementation or "").startswith("flash_attention")
    if flash and config.dtype == "float32":
        _refuse(
            f"attn_implementation={config.attn_implementation!r} computes in 16 bits, not in "
            "dtype='float32'"
        )
    if config.overlong_buffer > config.max_completion_length:
        _refuse(
            f"overlong_buffer={config.overlong_buffer} is more than max_completion_length="
            f"{config.max_completion_length}: every completion would be fined"
        )
    if config.teacher is None:
        needs = [("hint_trigger", config.hint_trigger, "never")]
        needs += [("gate_reward", config.gate_reward, None)]
        needs += [("distill_coef", config.distill_coef, 0.0)]
        for name, value, off in needs:
            if value != off:
                _refuse(f"{name}={value!r} needs a teacher; set teacher, or {name} to {off}")


def _machine(config: Config) -> None:
    """What has to be here: a device of that kind, and optional packages."""
    try:
        device = known_device(config.device)
    except KepoConfigError as error:
        _refuse(str(error))
    if device.index is not None and launched() > 1:
        _refuse(
            f"device={config.device!r} would be every process's; set device: {device.type}, of "
            "which each takes its own"
        )
    for name in ("sampler", "liger_layers"):
        if getattr(config, name) in ("vllm", True) and device.type != "cuda":
            _refuse(f"{name}={getattr(config, name)!r} needs device: cuda, not {config.device!r}")
    needs = [(config.sampler == "vllm", "sampler", "vllm", "vllm")]
    needs += [(config.lora_rank > 0, "lora_rank", "peft", "lora")]
    quantises = config.teacher_bits is not None
    needs += [(quantises, "teacher_bits", p, "quant") for p in ("bitsandbytes", "accelerate")]
    needs += [(config.liger_layers, "liger_layers", "liger_kernel", "bench")]
    for wanted, name, package, extra in needs:
        if wanted and importlib.util.find_spec(package) is None:
            _refuse(
                f"{name}={getattr(config, name)!r} needs the package {package}; "
                f"pip install 'kepo[{extra}]'"
            )


def _ranges(config: Config) -> None:
    def bound(names: str, holds: Any, expected: str) -> None:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                _refuse(f"{name}={value!r}; expected {expected}")
            if isinstance(value, float) and abs(value) > LARGEST:
                _refuse(
                    f"{name}={value!r}; expected at most {LARGEST:g}, to stay finite in float32"
                )

    bound(
        "steps prompts_per_step num_iterations micro_batch rollout_batch max_completion_length "
        "num_hinted max_attempts save_every keep_checkpoints eval_limit eval_batch workspace_bytes "
        "rollout_tokens",
        lambda x: x >= 1,
        "a number >= 1",
    )
    bound("num_generations", lambda x: x >= 2, "at least 2: advantages are relative to a group")
    bound(
        "warmup_steps weight_decay kl_coef policy_coef distill_coef eval_every epsilon_high "
        "max_skipped_steps seed dynamic_sampling overlong_buffer log_completions_every lora_rank",
        lambda x: x >= 0,
        "a number >= 0",
    )
    bound(
        "lr max_grad_norm sampling_temperature temperature hinted_cap hinted_gamma "
        "sampler_cap lora_alpha",
        lambda x: x > 0,
        "a number > 0",
    )
    bound("rank_timeout_minutes", lambda x: 0 < x <= 10**6, "a number in (0, 1000000]")
    bound("hint_retries", lambda x: x >= 0, "a number >= 0")
    bound("hint_temperature", lambda x: x > 0, "a number > 0: the first hint is the greedy one")
    bound("top_p vllm_memory", lambda x: 0 < x <= 1, "a number in (0, 1]")
    bound("eval_share", lambda x: 0 <= x < 1, "a number in [0, 1)")
    bound("beta epsilon_low lr_end data_fraction", lambda x: 0 <= x <= 1, "a number in [0, 1]")
    bound(
        "entropy_coef gate_threshold hint_threshold accept_threshold",
        lambda x: True,
        "a finite number",
    )


def _names(config: Config) -> None:
    def choose(name: str, choices: Sequence[Any]) -> None:
        value = getattr(config, name)
        if value not in choices:
            _refuse(f"{name}={value!r}; expected one of {', '.join(map(str, choices))}")

    choose("dtype", ("float32", "bfloat16"))  # float16 would need its losses scaled
    choose("sharding", ("none", "fsdp2"))
    choose("teacher_placement", ("copy", "fsdp2", "offload"))
    choose("teacher_bits", (None, 8, 4))
    choose("sampler", ("transformers", "vllm"))
    choose("sampler_correction", ("none", "truncate"))
    choose("bad_records", ("skip", "fail"))
    choose("changed_inputs", ("refuse", "accept"))
    choose("impl", ("auto", "triton", "cpu", "torch"))
    choose("policy_reduction", ("token_mean", "sequence_mean", "sum", "dr_grpo"))
    choose("distill_reduction", ("token_mean", "sequence_mean", "sum"))
    choose("policy_loss", ("clip", "cispo", "sapo", "reinforce"))
    choose("importance_level", ("token", "sequence"))
    choose("scale_rewards", ("group", "none"))
    choose("hint_trigger", ("failed", "always", "never"))
    choose("hinted_correction", ("none", "truncate", "shape"))
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
    if not all(abs(weight) <= LARGEST for weight in config.reward_weights):  # nan is not
        _refuse(f"reward_weights={config.reward_weights!r}; expected numbers up to {LARGEST:g}")
    if config.gate_reward is not None:
        choose("gate_reward", (*config.rewards, TOTAL))
    if config.hint_trigger != "never":
        choose("hint_reward", (*config.rewards, TOTAL))
        choose("accept_reward", (*config.rewards, TOTAL))


def _refuse(message: str) -> None:
    raise KepoConfigError(f"config: {message}")
