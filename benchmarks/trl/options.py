"""Every option of GRPOConfig and DistillationConfig: what our adapters make of it.

The names come from the installed classes, the verdicts from here; an option of TRL's that is not
named here is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

EQUAL, FALLBACK, REFUSED, UNCONCERNED = "equal", "fallback", "refused", "not concerned"
HEAD, JOINT, DISTILLATION = "fuse_head", "KepoGRPOTrainer", "KepoDistillationTrainer"


class Row(NamedTuple):
    config: str
    option: str
    adapter: str
    verdict: str
    why: str


# ---- TRL's own options: name -> verdict and reason ----

SAMPLING = (
    "generation is TRL's own code",
    "num_generations num_generations_eval ds3_gather_for_generation generation_batch_size top_p "
    "top_k min_p generation_kwargs chat_template_kwargs repetition_penalty cache_implementation "
    "max_tool_calling_iterations use_transformers_continuous_batching "
    "transformers_continuous_batching_config use_transformers_paged vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host "
    "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
    "vllm_max_model_length vllm_tensor_parallel_size",
)
REWARDS = (
    "advantages are computed by TRL's own code, before the loss",
    "reward_weights multi_objective_aggregation scale_rewards",
)
LOADING = (
    "loading and data are TRL's own code",
    "model_init_kwargs trust_remote_code shuffle_dataset",
)
LOGS = (
    "logs are TRL's own code",
    "log_completions log_multimodal num_completions_to_print log_unique_prompts "
    "log_completions_hub_repo",
)
IN_THE_LOSS = {
    "disable_dropout": "it is set in the model, which is the same",
    "cast_lm_head_to_fp32": "the products are fp32; the states are not copied",
    "max_completion_length": "dr_grpo's normaliser",
    "pad_to_multiple_of": "padding is masked, and costs nothing in the head",
    "steps_per_generation": "dapo's and cispo's normaliser",
    "num_iterations": "log-probabilities of the older policy",
    "temperature": "",
    "beta": "",
    "epsilon": "",
    "epsilon_high": "cispo's bound is epsilon_high itself, as in TRL",
    "sapo_temperature_pos": "",
    "sapo_temperature_neg": "",
    "importance_sampling_level": "",
    "mask_truncated_completions": "it is in the mask",
    "sync_ref_model": "log-probabilities of the reference come from our head, too",
    "ref_model_mixup_alpha": "as sync_ref_model",
    "ref_model_sync_steps": "as sync_ref_model",
    "entropy_coef": "",
    "use_adaptive_entropy": "TRL's own code steers the coefficient, by our entropies",
    "entropy_coef_min": "as use_adaptive_entropy",
    "entropy_coef_max": "as use_adaptive_entropy",
    "entropy_coef_delta": "as use_adaptive_entropy",
    "entropy_target": "as use_adaptive_entropy",
    "use_vllm": "its importance sampling ratio multiplies the policy term",
    "vllm_importance_sampling_correction": "as use_vllm",
    "vllm_importance_sampling_mode": "one ratio per token, or one per sequence",
    "vllm_importance_sampling_clip_max": "it is in the ratio",
    "vllm_importance_sampling_clip_min": "it is in the ratio",
    "vllm_importance_sampling_cap": "it is in the ratio",
    "use_bias_correction_kl": "",
}
OF_OTHER_TOKENS = "a token's loss depends on other tokens'; log-probabilities from the head"
FALLS_BACK = {
    "router_aux_loss_coef": "the auxiliary loss of a mixture of experts is TRL's",
    "top_entropy_quantile": OF_OTHER_TOKENS + ", if < 1",
    "off_policy_mask_threshold": OF_OTHER_TOKENS + ", if set",
    "delta": "if <= 1 + epsilon_high; above it is equal",
    "vespo_k_pos": "of vespo",
    "vespo_lambda_pos": "of vespo",
    "vespo_k_neg": "of vespo",
    "vespo_lambda_neg": "of vespo",
}
OF_A_TEACHER = {
    "teacher_model_name_or_path": (UNCONCERNED, "TRL's command reads it"),
    "teacher_model_revision": (EQUAL, "the teacher is loaded with it"),
    "teacher_model_init_kwargs": (EQUAL, "the teacher is loaded with them"),
}

# ---- options of transformers.TrainingArguments that could touch a loss in the head ----

INHERITED = {
    "bf16": (EQUAL, "autocast holds in the head as for any linear layer"),
    "fp16": (EQUAL, "as bf16"),
    "bf16_full_eval": (EQUAL, "as bf16"),
    "fp16_full_eval": (EQUAL, "as bf16"),
    "gradient_accumulation_steps": (EQUAL, "it is in the weights"),
    "gradient_checkpointing": (EQUAL, "of the backbone; the head keeps no logits"),
    "gradient_checkpointing_kwargs": (EQUAL, "as gradient_checkpointing"),
    "activation_checkpointing": (EQUAL, "as gradient_checkpointing"),
    "activation_checkpointing_kwargs": (EQUAL, "as gradient_checkpointing"),
    "ddp_find_unused_parameters": (EQUAL, "the loss is computed inside DDP's forward"),
    "ddp_static_graph": (EQUAL, "as ddp_find_unused_parameters"),
    "per_device_train_batch_size": (EQUAL, "it is in the weights"),
    "use_liger_kernel": (EQUAL, "TRL leaves Liger's layers on and its losses off"),
    "liger_kernel_config": (EQUAL, "as use_liger_kernel"),
    "torch_compile": (EQUAL, "the graph breaks at the head"),
    "fsdp": (EQUAL, "version 2; FSDP1 is refused by FusedHead"),
    "fsdp_config": (EQUAL, "as fsdp"),
    "deepspeed": (EQUAL, "ZeRO-3 gathers the head around its forward; a teacher is held whole"),
    "parallelism_config": (REFUSED, "FusedHead refuses a tensor-parallel head"),
    "label_smoothing_factor": (UNCONCERNED, "no loss of TRL's reads it"),
}
OTHERS = "a setting of transformers.Trainer around the loss, not in it"


def rows() -> Iterator[Row]:
    """List a row for each loss type, option and adapter, from the installed classes.

    Raises KeyError for an option or a loss type of TRL's that has no verdict here.
    """
    from trl import DistillationConfig, GRPOConfig

    yield from _loss_types()
    for adapter in (HEAD, JOINT):
        for name in _fields(GRPOConfig):
            if name != "loss_type":
                yield Row("GRPOConfig", name, adapter, *_verdict(name, adapter))
    for name in _fields(DistillationConfig):
        yield Row("DistillationConfig", name, DISTILLATION, *_verdict(name, DISTILLATION))


def _loss_types() -> Iterator[Row]:
    verdicts = {
        **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"), EQUAL),
        "vespo": FALLBACK,
    }
    for kind in sorted(loss_types()):
        option = f"loss_type={kind}"
        yield Row("GRPOConfig", option, HEAD, EQUAL, "TRL's own loss")
        why = OF_OTHER_TOKENS if verdicts[kind] == FALLBACK else ""
        yield Row("GRPOConfig", option, JOINT, verdicts[kind], why)


def loss_types() -> set[str]:
    """Find the names that TRL's loss compares `self.loss_type` with."""
    from trl import GRPOTrainer

    source = textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss))
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    found = set()
    for node in compared:
        if ast.unparse(node.left) == "self.loss_type":
            words = ast.walk(node.comparators[0])
            found |= {word.value for word in words if isinstance(word, ast.Constant)}
    return found


def _fields(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _verdict(name: str, adapter: str) -> tuple[str, str]:
    from transformers import TrainingArguments

    if name in _fields(TrainingArguments):
        return INHERITED.get(name, (UNCONCERNED, OTHERS))
    if name in FALLS_BACK:
        return (EQUAL, "TRL's own loss") if adapter == HEAD else (FALLBACK, FALLS_BACK[name])
    if name in IN_THE_LOSS:
        if adapter == DISTILLATION and name in ("use_vllm", "max_completion_length"):
            return UNCONCERNED, SAMPLING[0]
        return EQUAL, IN_THE_LOSS[name]
    if name in OF_A_TEACHER:
        return OF_A_TEACHER[name]
    return UNCONCERNED, KNOWN[name]


KNOWN = {name: why for why, names in (SAMPLING, REWARDS, LOADING, LOGS) for name in names.split()}
