"""The command of the example, as verl reads it: nothing is started."""

import re
import shlex

import pytest

pytest.importorskip("verl")

import hydra
from omegaconf import OmegaConf
from places import ROOT
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.import_utils import load_class_from_fqn

from kepo_kernels.integrations.verl import use_kepo
from kepo_kernels.integrations.verl.distilled import BETAS

use_kepo()

SCRIPT = ROOT / "examples" / "in_trainers" / "verl_kepo.sh"
MODULE = "kepo_kernels.integrations.verl.plugin"


def settings():
    """verl's whole configuration with the overrides of the example."""
    text = SCRIPT.read_text(encoding="utf-8").replace("$VERL_USE_EXTERNAL_MODULES", MODULE)
    command = text[text.index("python3") :].replace("\\\n", " ").replace('"$@"', "")
    words = shlex.split(command)
    assert words[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", words[3:])


def test_verl_reads_the_example():
    config = settings()
    variables = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert variables.VERL_USE_EXTERNAL_MODULES == MODULE
    assert f"export VERL_USE_EXTERNAL_MODULES={MODULE}\n" in SCRIPT.read_text(encoding="utf-8")
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.distillation_loss.loss_mode in BETAS
    assert distillation.distillation_loss.log_prob_min_clamp is None
    teacher = distillation.teacher_models["default"]
    assert teacher.inference.engine_kwargs["vllm"]["max_logprobs"] == 32
    model = config.actor_rollout_ref.model
    assert model.use_fused_kernels and model.use_remove_padding
    assert model.fused_kernel_options.impl_backend == "torch"
    assert config.trainer.use_v1 and config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2")
    load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class)
    assert OmegaConf.to_container(config.kepo) == {"gate_threshold": 1.0}


def test_the_page_has_the_same_settings():
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ +(\S+=\S+) \\$", page, re.MULTILINE)
    assert shown and set(shown) <= set(SCRIPT.read_text(encoding="utf-8").split())
