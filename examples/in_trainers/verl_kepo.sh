#!/usr/bin/env bash
# KEPO in verl: GRPO on all rollouts, a served teacher's tokens distilled where the reward is 1.
# Data, GPUs, batch and any other setting of verl follow: verl_kepo.sh data.train_files=... trainer.n_gpus_per_node=8
export VERL_USE_EXTERNAL_MODULES=kepo_kernels.integrations.verl.plugin

python3 -m verl.trainer.main_ppo \
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=$VERL_USE_EXTERNAL_MODULES \
    actor_rollout_ref.model.path=Qwen/Qwen3-VL-2B-Instruct \
    actor_rollout_ref.model.use_fused_kernels=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    algorithm.adv_estimator=grpo \
    distillation.enabled=True distillation.nnodes=1 distillation.n_gpus_per_node=2 \
    distillation.teacher_models.teacher_model.model_path=Qwen/Qwen3-VL-8B-Instruct \
    distillation.distillation_loss.loss_mode=kepo_jsd distillation.distillation_loss.topk=32 \
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=kepo_kernels.integrations.verl.gated_rollouts.GatedAgentLoopManager \
    +kepo.gate_threshold=1.0 \
    "$@"
