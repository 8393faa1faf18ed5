"""The settings of a run, in sections: one for each part of the program that reads them.

A section inherits the sections whose settings it needs: rewards depend on sampling; the objective
and hints depend on rewards and on whether there is a teacher. `kepo.config.Config` inherits all of
them, so it can be passed wherever one of them is expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kepo.words import Bound, Pairs

Finite = Annotated[float, Bound(lambda x: True, "a finite number")]
Positive = Annotated[float, Bound(lambda x: x > 0, "a number > 0")]
NonNegative = Annotated[float, Bound(lambda x: x >= 0, "a number >= 0")]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "a number in [0, 1]")]
ShareBelowOne = Annotated[float, Bound(lambda x: 0 <= x < 1, "a number in [0, 1)")]
PositiveShare = Annotated[float, Bound(lambda x: 0 < x <= 1, "a number in (0, 1]")]
NonNegativeInt = Annotated[int, Bound(lambda x: x >= 0, "a number >= 0")]
Count = Annotated[int, Bound(lambda x: x >= 1, "a number >= 1")]
Seconds = Annotated[float, Bound(lambda x: 0 < x <= 10**6, "a number in (0, 1000000]")]
Minutes = Annotated[float, Bound(lambda x: 0 < x <= 10**6, "a number in (0, 1000000]")]
GroupSize = Annotated[
    int, Bound(lambda x: x >= 2, "at least 2: advantages are relative to a group")
]


@dataclass(frozen=True)
class DataConfig:
    """The data that the student is trained and evaluated on."""

    train_data: str = ""
    """Training data: JSON Lines, JSON lists or Parquet, a file or a folder of them; a folder
    written by datasets.save_to_disk; the name of a dataset on the Hub, as owner/name:split; a
    folder in OmniMedVQA's layout; Med-R1's split files."""
    train_modalities: tuple[str, ...] | None = None
    """Train only on these modalities. None means all."""
    train_question_types: tuple[str, ...] | None = None
    """Train only on these question types. None means all."""
    eval_data: str | None = None
    """Data for greedy evaluation, in any of the layouts of train_data; all of it is used. None
    disables evaluation."""
    eval_share: ShareBelowOne = 0.0
    """Instead of eval_data: hold out this share of the images of train_data, from all modalities,
    for evaluation; none of them is trained on. A question without images counts as one. Every seed
    holds out the same images. 0 disables it."""
    eval_limit: Count | None = None
    """Maximum number of questions per modality in an evaluation. None means all."""
    image_root: str | None = None
    """Folder that image paths are relative to. None means the dataset's folder, or its file's; for
    Med-R1's files, the nearest parent folder that contains Images."""
    bad_records: Literal["skip", "fail"] = "skip"
    """skip: leave out records that are wrong, or whose image is missing or outside image_root, and
    count them in data.json. fail: end the run at the first such record."""
    verify_images: bool = True
    """Decode every image before the first step, so that an unreadable one counts as a bad record
    instead of an error in mid-run, and images are compared by content. False only checks that the
    image files exist."""
    changed_inputs: Literal["refuse", "accept"] = "refuse"
    """Whether a run may be resumed with a different teacher, with different questions, answers or
    images, or with other files of rewards and task of your own, than it began with. refuse: name
    the changes and end the run. accept: name them and continue."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen teacher; distillation and hints both depend on whether there is one."""

    teacher: str | None = None
    """Folder or Hub name of the frozen teacher, or the address http://host:port/v1 of a server of
    one, which must have the student's tokenizer. None means plain GRPO."""
    teachers: Pairs = ()
    """Several teachers in place of one: a mapping from values of teacher_column to what teacher may
    be. Questions with another value are not trained on."""
    teacher_column: str = "modality"
    """Field of a record whose value chooses its teacher among teachers."""
    teacher_bits: Literal[8, 4] | None = None
    """Quantise the teacher's layers, but not its head, to 8 or 4 bits with bitsandbytes. None
    disables it."""
    teacher_placement: Literal["copy", "fsdp2", "offload"] = "copy"
    """copy: every process holds the whole teacher. fsdp2: the teacher is sharded over the
    processes. offload: like fsdp2, but kept in host memory and moved to the device layer by
    layer, once per step."""
    scores_on: Literal["host", "device"] = "host"
    """Where the teacher's hidden states wait from their computation, once per step, until the
    losses of the micro-batches and iterations read them: host memory or the device."""
    teacher_model: str | None = None
    """Name by which a server knows its model. None means the only one it offers."""
    teacher_top_k: Count = 20
    """Number of likeliest tokens that a server says the log-probabilities of, at each place; the
    other tokens count as one. vLLM allows 20, or as many as its --max-logprobs says."""
    teacher_at_once: Count = 8
    """Number of requests that each process has under way at a server at once."""
    teacher_timeout: Seconds = 120.0
    """Seconds in which a server must answer a request."""
    teacher_retries: NonNegativeInt = 4
    """How often a request that was not answered is made again, after 1, 2, 4, ... seconds, before
    the run saves its state and ends."""

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or bool(self.teachers)

    @property
    def teacher_paths(self) -> dict[str, str]:
        """The teachers, by the setting that names each."""
        alone = {} if self.teacher is None else {"teacher": self.teacher}
        return alone | {f"teachers.{value}": name for value, name in self.teachers}


@dataclass(frozen=True)
class PicturesConfig:
    """The size at which the models see pictures."""

    min_pixels: Count | None = None
    """Fewest pixels, width times height, at which a picture is shown: smaller ones are enlarged, in
    their own shape, with sides of whole tokens. None means as each model's
    preprocessor_config.json says."""
    max_pixels: Count | None = None
    """Most pixels at which a picture is shown: larger ones are made smaller likewise. None means as
    each model's preprocessor_config.json says."""


@dataclass(frozen=True)
class ModelsConfig(TeacherConfig, PicturesConfig):
    """The models that take part, where they live and how they are held."""

    student: str = ""
    """Folder or Hub name of the model to train: a vision-language model of a known family, or a
    text-only causal model for questions without pictures."""
    device: str = "auto"
    """Device of student and teacher: cpu, cuda, cuda:<number>, or auto, which is cuda where there
    is a GPU, else cpu. Under torchrun, cuda is each process's own GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"  # float16 would need its losses scaled
    """Dtype in which student and teacher compute: float32 or bfloat16. Trained weights are kept in
    float32 if sharding is fsdp2 or if they are LoRA adapters."""
    sharding: Literal["none", "fsdp2"] = "none"
    """How the student is distributed over the processes of torchrun. none: each holds a whole copy
    (DDP). fsdp2: each holds a share of the weights, gradients and optimiser state."""
    rollout_gather: bool = True
    """Under fsdp2, gather all of the student's weights once per rollout. False gathers them layer
    by layer for every token, which is far slower but holds at most one layer in memory."""
    lora_rank: NonNegativeInt = 0
    """Rank of the LoRA adapters to train on the language model's linear layers; all other weights
    are frozen, in dtype, or under fsdp2 in float32. 0 disables adapters: all weights are
    trained."""
    student_bits: Literal[8, 4] | None = None
    """Quantise the student's layers under its adapters, but not its head, to 8 or 4 bits with
    bitsandbytes (QLoRA), and those of the reference. Needs lora_rank. None disables it."""
    lora_alpha: Positive = 32.0
    """LoRA scaling: the adapters' output is multiplied by lora_alpha / lora_rank."""
    freeze_vision: bool = False
    """Do not train the vision tower and what makes tokens of its features. With LoRA adapters it is
    never trained; a text-only model has none."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in backward instead of keeping them."""
    attn_implementation: str | None = None
    """Attention implementation, by its name in transformers, e.g. flash_attention_2. None means
    transformers' default."""
    share_prompts: bool = True
    """Compute each prompt once for all its completions, in training and scoring. False computes it
    again for each. Attention implementations that take no mask, such as flash_attention_2, and
    models with layers that see a window, such as Gemma 2 and Mistral, compute it again too, and the
    run says so."""
    liger_layers: bool = False
    """Use Liger's kernels for norms, rotary embedding and, where it has one, the MLP. Needs CUDA
    and a liger-kernel that fits the installed transformers."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What samples completions: transformers, or vllm in the same processes."""
    vllm_memory: PositiveShare = 0.3
    """Share of each GPU's memory that vLLM reserves; on a CPU, of the machine's."""


@dataclass(frozen=True)
class SamplingConfig:
    """The questions of a step, and how the student answers them."""

    seed: NonNegativeInt = 0
    """Seed of data order and sampling. On a CPU, the same seed on the same machine gives
    bit-identical runs."""
    prompts_per_step: Count = 16
    """Questions per step. Each is answered num_generations times."""
    num_generations: GroupSize = 8
    """Completions per question. They form the group that advantages are relative to."""
    data_fraction: Share = 0.0
    """Share of a step's questions that are answered once by the dataset's own worked solution, with
    advantage 1, instead of by the student. 1 means supervised training; values between 0 and 1 give
    GKD's mixture."""
    dynamic_sampling: NonNegativeInt = 0
    """Maximum number of rounds in which groups whose rewards are all equal are replaced by other
    questions; see dynamic_reward. 0 disables it: they stay."""
    max_completion_length: Count = 128
    """Maximum number of tokens per completion."""
    sampling_temperature: Positive = 1.0
    """Temperature at which completions are generated. If it differs from `temperature`, samples
    come from a different distribution than the one scored."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling threshold for generation. 1 disables it."""
    rollout_batch: Count = 256
    """Maximum number of completions that one process generates at once."""
    rollout_tokens: Count | None = None
    """Maximum number of tokens in such a batch, counting prompts and max_completion_length for each
    completion. None means no such limit."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked about an example, and what is a right answer."""

    task: str = "multiple_choice"
    """multiple_choice: questions with two to 26 options, answered by a letter. open_answer:
    questions answered by a number, with a unit or without, or by a short text. Or a class of your
    own, as file.py:Class or package.module:Class."""
    system_prompt: str = ""
    """System turn of every question that brings none. Empty means none."""
    prompt_template: str = ""
    """The question's turn, with {question}, {instruction} and the names of the data's columns in
    braces; {{ and }} are braces. A column that is the right answer is refused. Empty means the
    question and the instruction, a line each."""
    answer_tolerance: NonNegative = 1e-4
    """open_answer: how far a number may be from the right one, relative to the right one."""


@dataclass(frozen=True)
class RewardConfig(SamplingConfig, TaskConfig):
    """Rewards of sampled completions, which may also depend on a completion's length."""

    rewards: tuple[str, ...] = ("accuracy", "format")
    """Reward functions: accuracy, format, overlong, or functions of your own with TRL's signature,
    as file.py:function or package.module:function. Gates, hints and logs call them by the last part
    of the name."""
    reward_weights: tuple[Finite, ...] = (1.0, 1.0)
    """Weight of each reward in the total reward, from which advantages are computed. Where it is
    not set, each has 1."""
    dynamic_reward: str = "total"
    """Reward by which dynamic_sampling finds groups that are all equal: one of rewards, or
    total."""
    overlong_buffer: NonNegativeInt = 0
    """The reward overlong falls from 0 to -1 over the last overlong_buffer tokens before the length
    limit (DAPO). 0 where it is not among the rewards."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """group: divide advantages by the standard deviation of the rewards in their group. batch: by
    that of all rewards in the step. none: leave them unscaled."""


@dataclass(frozen=True)
class ObjectiveConfig(RewardConfig, TeacherConfig):
    """The loss that is minimised: a policy term, made of rewards, plus distillation from the
    teacher."""

    mini_batches: Count = 1
    """Parts into which the questions of a step are divided, with an optimiser step on each. From
    the second on, the policy ratio differs from 1: it is to the policy of before the first."""
    num_iterations: Count = 1
    """Passes over the completions of a step, each of mini_batches optimiser steps. From the second
    on, the policy ratio differs from 1."""
    mask_truncated: bool = False
    """Exclude completions that hit the length limit from the loss."""
    temperature: Positive = 1.0
    """Softmax temperature of the log-probabilities and of the divergence."""
    teacher_temperature: Positive | None = None
    """Softmax temperature of the teacher in the divergence. None means that it is temperature."""
    policy_coef: NonNegative = 1.0
    """Weight of the whole policy term, including the KL penalty and the entropy bonus. 0 disables
    it."""
    policy_loss: Literal["clip", "cispo", "sapo", "reinforce"] = "clip"
    """Form of the policy loss: clip, cispo, sapo or reinforce."""
    importance_level: Literal["token", "sequence"] = "token"
    """Level of the policy ratio: token, or sequence for GSPO's ratios."""
    epsilon_low: Share = 0.2
    """The policy ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: NonNegative = 0.2
    """The policy ratio is clipped above at 1 + epsilon_high; so is that of cispo, where TRL's bound
    is its epsilon_high itself."""
    delta: Positive | None = None
    """Upper bound of the policy ratio of clip, for negative advantages too (two-sided clip); more
    than 1 + epsilon_high. None disables it."""
    sapo_temperature_pos: Positive = 1.0
    """Temperature of sapo's sigmoid for tokens with a positive advantage."""
    sapo_temperature_neg: Positive = 1.05
    """Temperature of sapo's sigmoid for all other tokens."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL penalty towards the initial student. 0 disables it, and no reference model
    is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty, with d = reference - policy log-probability: k1 is -d, k2 is
    d^2 / 2, k3 is e^d - d - 1. In expectation the gradient of k1 is 0, that of k2 the gradient of
    KL(policy|reference), that of k3 the gradient of KL(reference|policy)."""
    kl_bias_correction: bool = False
    """Whether the KL penalty is multiplied by the ratio of policy and sampling policy, through
    which its gradient then goes too: TRL's use_bias_correction_kl."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    policy_reduction: Literal["token_mean", "sequence_mean", "sum", "dr_grpo"] = "sequence_mean"
    """How the policy term is averaged: token_mean, sequence_mean, sum, or dr_grpo, which is sum /
    (completions * max_completion_length)."""
    distill_coef: NonNegative = 1.0
    """Weight of the divergence from the teacher. 0 disables distillation."""
    beta: Share = 0.5
    """Divergence from the teacher: 0 is KL(teacher|student), 1 is KL(student|teacher), values
    between are the JSD."""
    gate_reward: str | None = "accuracy"
    """Reward that the quality gate reads: one of rewards, or total. None distils on every
    completion."""
    gate_threshold: Finite | None = 1.0
    """The gate opens for completions whose gate_reward is at least this. None means a soft gate:
    the divergence is multiplied by that reward where it is positive."""
    gate_side: Literal["right", "wrong"] = "right"
    """right: the gate opens as gate_threshold says. wrong: it opens for the others, those whose
    gate_reward is less than gate_threshold, but not where the reward does not apply."""
    step_weights: bool = False
    """Distil less on those reasoning steps of a completion where student and teacher have drifted
    apart since its first one (SOD). A reasoning step is a line, or a tagged part."""
    distill_tokens: Literal["all", "first_error", "after_error"] = "all"
    """Tokens of an open completion that are distilled on. all: every one. first_error: those up to
    and with the first one to which the teacher gives a probability less than error_threshold.
    after_error: those after it. The others cost nothing in the loss, and the weights of these stay
    as they are, so that first_error and after_error add up to all."""
    error_threshold: PositiveShare = 0.1
    """A sampled token is an error if the teacher gives it a smaller probability, at the temperature
    of the divergence; see distill_tokens."""
    distill_reduction: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    """How the divergence is averaged over the sequences whose gate is open: token_mean,
    sequence_mean or sum."""
    data_weight: Share | None = None
    """Share of the divergence's weight that the dataset's solutions have together, in every
    mini-batch that has both them and completions of the student. None means that a token of either
    weighs the same."""
    sampler_correction: Literal["none", "truncate"] = "none"
    """truncate: weight each token sampled without a hint by the ratio of the policy's probability
    to the probability it was drawn with, at most sampler_cap. Use it if the sampler computes
    differently from the trainer. none disables it."""
    sampler_cap: Positive = 2.0
    """Upper bound of the weights of sampler_correction."""
    hinted_correction: Literal["none", "truncate", "shape", "clip"] = "none"
    """How hinted successes are weighted. none: they are trained on as if sampled without the hint.
    truncate: each token is weighted by its probability without the hint over that with it, at most
    hinted_cap. shape: each token is weighted by g q / (q + g)^2, where q is its probability without
    the hint and g = hinted_gamma (LUFFY). clip: the policy ratio of each token is to its
    probability with the hint, gradient and clip included (Guide-GRPO)."""
    hinted_cap: Positive = 2.0
    """Upper bound of the weights of hinted_correction truncate."""
    hinted_gamma: Positive = 0.1
    """The constant g of hinted_correction shape."""
    impl: Literal["auto", "triton", "cpu", "torch"] = "auto"
    """Back-end of the fused losses: auto, triton, cpu or torch."""
    workspace_bytes: Count | None = None
    """Memory in bytes for the logits of one chunk. None means the library's default."""
    logits_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the logits in the fused losses. None means float32, but bfloat16 where dtype is
    bfloat16 on a CPU that computes in it."""
    grad_tol: ShareBelowOne = 0.0
    """Share of the logits' gradient that may be left out, with the vocabulary's columns that carry
    it, to save time on a CPU. 0 is exact."""

    @property
    def distils(self) -> bool:
        return self.taught and self.distill_coef > 0


@dataclass(frozen=True)
class HintConfig(RewardConfig, TeacherConfig):
    """Settings of hints: when the teacher gives them, which depends on rewards, and how the student
    samples with them."""

    hint_trigger: Literal["failed", "always", "never"] = "failed"
    """Groups that get a hint. failed: groups in which no sample's hint_reward reaches
    hint_threshold. always: every group. never: none."""
    hint_for: Literal["student", "teacher", "nobody"] = "student"
    """Who sees the hint. student: it samples again with the hint in its prompt. teacher: nothing is
    sampled again; the group's failures are distilled on whatever the gate says, from the teacher
    with the hint in its prompt. nobody: the student samples again as often without a hint, and its
    successes are accepted alike; no teacher is needed."""
    hint_reward: str = "accuracy"
    """Reward that decides whether a group has failed: one of rewards, or total."""
    hint_threshold: Finite = 1.0
    """A group has failed if no sample's hint_reward is at least this; see hint_trigger."""
    accept_reward: str = "accuracy"
    """Reward that decides whether a hinted completion is a success: one of rewards, or total."""
    accept_threshold: Finite = 1.0
    """A hinted completion is a success if its accept_reward is at least this, unless it was cut off
    or mentions the hint."""
    num_hinted: Count = 2
    """Maximum number of worse samples in a group that hinted successes may replace. This and the
    next are not read if hint_for is teacher."""
    max_attempts: Count = 5
    """Maximum number of rounds of sampling with a hint."""
    hint_with_answer: bool = False
    """Tell the teacher the right answer when it writes the hint."""
    hint_gives_answer: bool = False
    """Tell the student the right answer along with the hint."""
    leak_filter: bool = True
    """Discard hints that state an answer, as decided by kepo.tasks.leaks."""
    hint_retries: NonNegativeInt = 2
    """How often to ask again for a hint that is unusable: one that states an answer, is malformed
    or cut off, or contains control tokens. A question that gets no usable hint stays without
    one."""
    hint_temperature: Positive = 0.7
    """Temperature at which a hint is written again; the first attempt is greedy."""

    @property
    def hints(self) -> bool:
        """Whether a teacher writes hints."""
        return self.rescues and self.hint_for != "nobody"

    @property
    def rescues(self) -> bool:
        """Whether anything is done for groups of `hint_trigger`, with hints or without."""
        return self.hint_trigger != "never" and (self.taught or self.hint_for == "nobody")

    @property
    def samples_again(self) -> bool:
        """Whether completions are sampled for those groups."""
        return self.rescues and self.hint_for != "teacher"


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser and of its learning rate."""

    steps: Count = 200
    """Number of optimiser steps."""
    micro_batch: Count = 32
    """Maximum number of completions per forward and backward pass; gradients accumulate over the
    step."""
    micro_tokens: Count | None = None
    """Maximum number of tokens per forward and backward pass, prompts and padding included; with
    share_prompts a prompt counts once for its group. None means no such limit. A group is divided
    only if it alone exceeds a limit, or if processes would wait for the one that has it."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: torch's, with two moments in the dtype of the trained weights. adamw_8bit:
    bitsandbytes', with moments in 8 bits, a quarter of them or less."""
    lr: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps over which the learning rate rises linearly to lr. 0 disables warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the learning rate goes from lr, after the warm-up, to lr_end of it at the last step:
    constant, linear or cosine (half a wave). None means linear if lr_end is given, else
    constant."""
    lr_end: Share | None = None
    """Share of lr that is left at the last step. None means 0 if lr_schedule is linear or cosine,
    and 1 if it is constant."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients whose norm is larger are scaled down to this norm."""
    max_skipped_steps: NonNegativeInt = 3
    """Number of consecutive steps that may be skipped because states, loss or gradient are not
    finite; one more ends the run."""

    @property
    def decay(self) -> tuple[str, float]:
        """Return the form of the learning rate's way to the last step, and the share left there; a
        way that ends at 1 is constant, whatever its form."""
        form = self.lr_schedule or ("constant" if self.lr_end is None else "linear")
        end = self.lr_end if self.lr_end is not None else float(form == "constant")
        return ("constant" if end == 1.0 else form), end


@dataclass(frozen=True)
class RunConfig:
    """The files that a run writes, and when it saves, evaluates and logs."""

    run_dir: str = "runs/kepo"
    """Folder for checkpoints, metrics.jsonl and curves.png. A run that already exists there is
    resumed."""
    save_every: Count = 50
    """Steps between checkpoints. The last step is always saved."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints kept on disk."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations. 0 evaluates only before the first and after the last step."""
    eval_batch: Count = 64
    """Number of questions answered at once in an evaluation."""
    log_completions_every: NonNegativeInt = 10
    """Write all completions of every so many steps to completions.jsonl. 0 disables it."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that are told, besides, what goes to metrics.jsonl and completions.jsonl, pictures
    included: tensorboard, wandb, trackio, or several of them."""
    rank_timeout_minutes: Minutes = 15.0
    """Minutes that one of several ranks may stand still, or be late at the start, before it is
    named and all ranks end. Reading and computing do not count as standing still."""
