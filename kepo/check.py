"""Checks that refuse settings that cannot work, by name, before any model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from kepo.config import TOTAL, Config
from kepo.data.layouts import from_python
from kepo.data.load import layout_of
from kepo.distributed.processes import launched
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.device import known_device
from kepo.objective.workspace import check_workspace
from kepo.sections import ModelsConfig, RewardConfig
from kepo.tasks.environment import Environment, environment_of
from kepo.tasks.rewards import reward_name


def check(config: Config, env: Environment | None = None) -> None:
    """Raise KepoConfigError for the first setting that conflicts with another setting, with the
    data or with this machine. env: the task and the rewards; None means those that the config
    names."""
    check_settings(config, env)
    if not config.train_data:
        _refuse("train_data is not set; give a folder in OmniMedVQA's layout, or see --help")
    for name in ("train_data", "eval_data"):
        folder = getattr(config, name)
        if folder not in (None, from_python.NAME):
            try:
                layout_of(folder)
            except KepoDataError as error:
                _refuse(f"{name}={folder!r}: {error}")
    _machine(config)
    check_workspace(config, config)


def check_settings(config: Config, env: Environment | None = None) -> None:
    """Run the part of ``check`` that reads only the settings; the data need not exist yet."""
    by_name = {} if config.gate_reward is None else {"gate_reward": config.gate_reward}
    if config.hint_trigger != "never":
        by_name |= {"hint_reward": config.hint_reward, "accept_reward": config.accept_reward}
    _reward_names(config, environment_of(config) if env is None else env, by_name)
    if not config.student:
        _refuse("student is not set; give the folder of a vision-language model")
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
    if config.overlong_buffer and "overlong" not in config.rewards:
        _refuse(
            f"overlong_buffer={config.overlong_buffer} is read by the reward overlong alone; add "
            "overlong to rewards, and a weight, or set overlong_buffer: 0"
        )
    if config.teacher is None:
        for name, value, off in (
            ("hint_trigger", config.hint_trigger, "never"),
            ("gate_reward", config.gate_reward, None),
            ("distill_coef", config.distill_coef, 0.0),
        ):
            if value != off:
                _refuse(f"{name}={value!r} needs a teacher; set teacher, or {name} to {off}")


def _machine(config: ModelsConfig) -> None:
    """Check that this machine has the configured device and the optional packages that are
    needed."""
    device = known_device(config.device)
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


def _reward_names(config: RewardConfig, env: Environment, by_name: Mapping[str, str]) -> None:
    """Check reward names; ``by_name`` maps each setting that names a reward, or the total, to its
    value."""
    if not env.rewards:
        _refuse("rewards=(); expected at least one name")
    if len(config.reward_weights) != len(env.rewards):
        _refuse(
            f"reward_weights has {len(config.reward_weights)} values for {len(env.rewards)} rewards"
        )
    choices = (*env.rewards, TOTAL)
    if TOTAL in env.rewards:
        _refuse(f"rewards: {TOTAL!r} is the sum of them all; call the function something else")
    for name, value in by_name.items():
        if reward_name(value) not in choices:
            _refuse(f"{name}={value!r}; expected one of {', '.join(choices)}")


def _refuse(message: str) -> None:
    raise KepoConfigError(message)
