"""The settings of a run in sections, one for each part of the program that reads them.

A section inherits those whose settings it cannot be read without: rewards are of what was sampled,
objective and hints are made of rewards and know whether there is a teacher. `kepo.config.Config`
inherits them all, so it is each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kepo.words import Bound

Finite = Annotated[float, Bound(lambda x: True, "a finite number")]
Positive = Annotated[float, Bound(lambda x: x > 0, "a number > 0")]
NonNegative = Annotated[float, Bound(lambda x: x >= 0, "a number >= 0")]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "a number in [0, 1]")]
ShareBelowOne = Annotated[float, Bound(lambda x: 0 <= x < 1, "a number in [0, 1)")]
PositiveShare = Annotated[float, Bound(lambda x: 0 < x <= 1, "a number in (0, 1]")]
NonNegativeInt = Annotated[int, Bound(lambda x: x >= 0, "a number >= 0")]
Count = Annotated[int, Bound(lambda x: x >= 1, "a number >= 1")]
Minutes = Annotated[float, Bound(lambda x: 0 < x <= 10**6, "a number in (0, 1000000]")]
GroupSize = Annotated[
    int, Bound(lambda x: x >= 2, "at least 2: advantages are relative to a group")
]


@dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on."""

    train_data: str = ""
    """Folder in OmniMedVQA's layout, Med-R1's split files, or what datasets.save_to_disk wrote."""
    train_modalities: tuple[str, ...] | None = None
    """Train on these modalities only. None = all."""
    train_question_types: tuple[str, ...] | None = None
    """Train on these types of question only. None = all."""
    eval_data: str | None = None
    """Data for greedy evaluation, all of it, in any of those layouts. None = no evaluation."""
    eval_share: ShareBelowOne = 0.0
    """In place of eval_data: evaluate on this share of the images of train_data, all modalities,
    and train on none of them. The same images for every seed. 0 = no such split."""
    eval_limit: Count | None = None
    """Questions per modality in an evaluation. None = all."""
    image_root: str | None = None
    """Where image paths begin. None = the dataset's folder; for Med-R1's files the nearest folder
    above with Images in it."""
    bad_records: Literal["skip", "fail"] = "skip"
    """skip: records that are wrong, or whose image is missing or outside image_root, are left out
    and counted in data.json. fail: the first one ends the run."""
    verify_images: bool = True
    """Decode every image before the first step: an unreadable one is a bad record then, not an
    error in the middle, and images are compared by content. False = see only that they exist."""
    changed_inputs: Literal["refuse", "accept"] = "refuse"
    """At a resume with another teacher, or other questions, answers or images, than the run began
    with. refuse: named, and the end. accept: named, and it goes on."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen teacher: distillation and hints both read whether there is one."""

    teacher: str | None = None
    """Folder or Hub name of the frozen teacher with the same tokenizer. None = plain GRPO."""
    teacher_bits: Literal[8, 4] | None = None
    """8 or 4: quantise the teacher's layers, not its head, with bitsandbytes. None = not."""
    teacher_placement: Literal["copy", "fsdp2", "offload"] = "copy"
    """copy: a whole teacher in every process. fsdp2: shared out over the processes. offload: the
    same, kept in host memory and moved layer by layer."""


@dataclass(frozen=True)
class ModelsConfig(TeacherConfig):
    """Which models take part, where they live and how they are held."""

    student: str = ""
    """Folder or Hub name of the vision-language model to train."""
    device: str = "cpu"
    """Where student and teacher live: cpu, cuda or cuda:<number>; under torchrun, cuda is each
    process's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"  # float16 would need its losses scaled
    """In which student and teacher compute: float32 or bfloat16. Weights that are trained
    are kept in float32 under sharding fsdp2, and as LoRA adapters."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Of the student over the processes of torchrun. none: each has a whole copy (DDP). fsdp2: each
    has a share of weights, gradients and optimiser."""
    rollout_gather: bool = True
    """Under fsdp2, gather the student's weights once for a rollout. False = layer by layer for
    every token: slower by far, with no more than one layer in memory."""
    lora_rank: NonNegativeInt = 0
    """Train adapters of this rank on the language model's linear layers; the rest is frozen, in
    dtype, or under fsdp2 in float32. 0 = all weights."""
    lora_alpha: Positive = 32.0
    """Adapters count lora_alpha / lora_rank times."""
    freeze_vision: bool = False
    """Do not train the vision tower. (With adapters it is never trained.)"""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward rather than keep what it computed."""
    attn_implementation: str | None = None
    """As transformers names it, flash_attention_2 for one. None = transformers' choice."""
    liger_layers: bool = False
    """Liger's kernels for norms and rotary embedding, and MLP where it has one. On CUDA, with a
    liger-kernel that fits the transformers installed."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What generates: transformers, or vllm in the same processes."""
    vllm_memory: PositiveShare = 0.3
    """Share of a GPU's memory that vLLM takes for itself."""


@dataclass(frozen=True)
class SamplingConfig:
    """Which questions a step asks and how the student answers them."""

    seed: NonNegativeInt = 0
    """Of data order and sampling. The same seed on the same machine gives the same bits,
    on a CPU."""
    prompts_per_step: Count = 16
    """Questions per step; each is answered num_generations times."""
    num_generations: GroupSize = 8
    """Completions per question, the group in which advantages are relative."""
    data_fraction: Share = 0.0
    """Share of a step's questions that the dataset's own worked solution answers, once, with
    advantage 1, instead of the student. 1 = supervised training, between = GKD's mixture."""
    dynamic_sampling: NonNegativeInt = 0
    """Rounds in which groups of equal rewards are replaced by other questions. 0 = they stay."""
    max_completion_length: Count = 128
    """Tokens per completion, at most."""
    sampling_temperature: Positive = 1.0
    """Of generation. Other than temperature, it makes the sampled law differ from the scored
    one."""
    top_p: PositiveShare = 1.0
    """Nucleus of generation. 1 = off."""
    rollout_batch: Count = 256
    """Completions generated at once in a process, at most."""
    rollout_tokens: Count | None = None
    """Tokens of those, prompts and max_completion_length together, at most. None = no such
    bound."""


@dataclass(frozen=True)
class RewardConfig(SamplingConfig):
    """What the sampled completions are worth; a completion's length counts too."""

    rewards: tuple[str, ...] = ("accuracy", "format")
    """Names from kepo.tasks.rewards.REWARDS."""
    reward_weights: tuple[Finite, ...] = (1.0, 1.0)
    """Their weights in the total reward, from which advantages are made."""
    overlong_buffer: NonNegativeInt = 0
    """Over the last so many tokens that fit, the total reward falls by up to 1 (DAPO). 0 = not."""
    scale_rewards: Literal["group", "none"] = "group"
    """group: advantages are divided by the group's standard deviation. none: they are not."""


@dataclass(frozen=True)
class ObjectiveConfig(RewardConfig, TeacherConfig):
    """What is minimised: the policy term, made of rewards, and distillation from the teacher."""

    num_iterations: Count = 1
    """Optimiser steps on the same completions; from the second on the ratio is not 1."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    temperature: Positive = 1.0
    """Softmax temperature of log-probabilities and divergence."""
    policy_coef: NonNegative = 1.0
    """Weight of the whole policy term, penalty and bonus included. 0 = none."""
    policy_loss: Literal["clip", "cispo", "sapo", "reinforce"] = "clip"
    """clip, cispo, sapo or reinforce."""
    importance_level: Literal["token", "sequence"] = "token"
    """token, or sequence for GSPO's ratios."""
    epsilon_low: Share = 0.2
    """The ratio is clipped below 1 - epsilon_low."""
    epsilon_high: NonNegative = 0.2
    """The ratio is clipped above 1 + epsilon_high."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 penalty towards the start point; 0 = absent, and no reference model is
    kept."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    policy_reduction: Literal["token_mean", "sequence_mean", "sum", "dr_grpo"] = "sequence_mean"
    """token_mean, sequence_mean, sum, or dr_grpo: sum / (completions * max_completion_length)."""
    distill_coef: NonNegative = 1.0
    """Weight of the divergence from the teacher. 0 = none."""
    beta: Share = 0.5
    """0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD."""
    gate_reward: str | None = "accuracy"
    """The reward the quality gate reads: one of rewards, or total. None = distil on everything."""
    gate_threshold: Finite | None = 1.0
    """The gate is open where that reward is at least this. None = a soft gate: the reward, where it
    is positive, multiplies the divergence."""
    step_weights: bool = False
    """Distil less where student and teacher have drifted apart since the first step of a
    completion, a line or a tagged part of it (SOD)."""
    distill_reduction: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    """token_mean, sequence_mean or sum, over the open sequences."""
    sampler_correction: Literal["none", "truncate"] = "none"
    """truncate: tokens sampled without a hint are weighted by the ratio of the policy's probability
    to the one they were drawn with, at most sampler_cap; for a sampler that computes in another
    way."""
    sampler_cap: Positive = 2.0
    """See sampler_correction."""
    hinted_correction: Literal["none", "truncate", "shape"] = "none"
    """none: hinted successes are trained on as if sampled without the hint. truncate: their tokens
    are weighted by the ratio of the two probabilities, at most hinted_cap. shape: by
    g q / (q + g)^2, q the probability without the hint and g = hinted_gamma (LUFFY)."""
    hinted_cap: Positive = 2.0
    """See hinted_correction."""
    hinted_gamma: Positive = 0.1
    """See hinted_correction."""
    impl: Literal["auto", "triton", "cpu", "torch"] = "auto"
    """Back-end of the fused losses: auto, triton, cpu or torch."""
    workspace_bytes: Count | None = None
    """Memory for the logits of one chunk. None = the library's default."""

    @property
    def distils(self) -> bool:
        return self.teacher is not None and self.distill_coef > 0


@dataclass(frozen=True)
class HintConfig(RewardConfig, TeacherConfig):
    """When the teacher gives hints, by rewards, and how the student samples with them."""

    hint_trigger: Literal["failed", "always", "never"] = "failed"
    """failed: hints for groups of which no sample reaches hint_threshold; always: for every group;
    never."""
    hint_reward: str = "accuracy"
    """The reward by which a group has failed: one of rewards, or total."""
    hint_threshold: Finite = 1.0
    """See hint_trigger."""
    accept_reward: str = "accuracy"
    """A completion with a hint is a success where this reward, one of rewards or total ..."""
    accept_threshold: Finite = 1.0
    """... is at least this; unless it was cut off, or speaks of the hint."""
    num_hinted: Count = 2
    """Worse samples of its group that hinted successes may replace."""
    max_attempts: Count = 5
    """Rounds of sampling with a hint."""
    hint_with_answer: bool = False
    """Tell the teacher the right letter when it writes the hint."""
    hint_gives_answer: bool = False
    """Tell the student the right letter along with the hint."""
    leak_filter: bool = True
    """Pass over hints that state an answer (kepo.tasks.leaks says which do)."""
    hint_retries: NonNegativeInt = 2
    """Times an unusable hint is asked for again: one that states an answer, is malformed or cut
    off, or has control tokens in it. A question without a usable one then stays without."""
    hint_temperature: Positive = 0.7
    """At which it is written again; the first is greedy."""

    @property
    def hints(self) -> bool:
        return self.teacher is not None and self.hint_trigger != "never"


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights follow the gradient."""

    steps: Count = 200
    """Optimiser steps."""
    micro_batch: Count = 32
    """Completions per forward and backward; gradients accumulate over the step."""
    lr: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise to lr."""
    lr_end: Share = 1.0
    """Share of lr left at the last step, reached in a straight line. 1 = constant."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: NonNegativeInt = 3
    """So many steps in a row whose states, loss or gradient are not finite are skipped; one more
    ends the run."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, and when."""

    run_dir: str = "runs/kepo"
    """Where checkpoints, metrics.jsonl and curves.png go. An existing run there is resumed."""
    save_every: Count = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay on disk."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations. 0 = before the first and after the last step only."""
    eval_batch: Count = 64
    """Questions answered at once in an evaluation."""
    log_completions_every: NonNegativeInt = 10
    """Steps between those whose completions are all written to completions.jsonl. 0 = never."""
    rank_timeout_minutes: Minutes = 15.0
    """So long may one of several processes stand still, or be late at the start, before it is named
    and all end. Reading and computing are not standing still."""
