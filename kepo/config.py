"""Every setting of a run, in one dataclass: documentation, YAML schema and command line at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kepo.disk.yaml_file import read_mapping
from kepo.errors import KepoConfigError
from kepo.words import expanded, sentence, typed

PRESETS = Path(__file__).parent / "presets"
TOTAL = "total"  # in place of a reward's name: the weighted sum of them all
PATHS = ("student", "teacher", "train_data", "eval_data", "image_root", "run_dir")
"""Settings in which a leading ~ stands for the home folder."""


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
    """Folder in OmniMedVQA's layout, Med-R1's split files, or what datasets.save_to_disk wrote."""
    train_modalities: tuple[str, ...] | None = None
    """Train on these modalities only. None = all."""
    train_question_types: tuple[str, ...] | None = None
    """Train on these types of question only. None = all."""
    eval_data: str | None = None
    """Data for greedy evaluation, all of it, in any of those layouts. None = no evaluation."""
    eval_share: float = 0.0
    """In place of eval_data: evaluate on this share of the images of train_data, all modalities,
    and train on none of them. The same images for every seed. 0 = no such split."""
    image_root: str | None = None
    """Where image paths begin. None = the dataset's folder; for Med-R1's files the nearest folder
    above with Images in it."""
    bad_records: str = "skip"
    """skip: records that are wrong, or whose image is missing or outside image_root, are left out
    and counted in data.json. fail: the first one ends the run."""
    verify_images: bool = True
    """Decode every image before the first step: an unreadable one is a bad record then, not an
    error in the middle, and images are compared by content. False = see only that they exist."""
    run_dir: str = "runs/kepo"
    """Where checkpoints, metrics.jsonl and curves.png go. An existing run there is resumed."""
    dtype: str = "float32"
    """In which student and teacher compute: float32 or bfloat16. Weights that are trained
    are kept in float32 under sharding fsdp2, and as LoRA adapters."""
    device: str = "cpu"
    """Where student and teacher live: cpu, cuda or cuda:<number>; under torchrun, cuda is each
    process's own."""
    changed_inputs: str = "refuse"
    """At a resume with another teacher, or other questions, answers or images, than the run began
    with. refuse: named, and the end. accept: named, and it goes on."""
    rank_timeout_minutes: float = 15.0
    """So long may one of several processes stand still, or be late at the start, before it is named
    and all end. Reading and computing are not standing still."""

    # ---- how the models are held ----
    sharding: str = "none"
    """Of the student over the processes of torchrun. none: each has a whole copy (DDP). fsdp2: each
    has a share of weights, gradients and optimiser."""
    rollout_gather: bool = True
    """Under fsdp2, gather the student's weights once for a rollout. False = layer by layer for
    every token: slower by far, with no more than one layer in memory."""
    teacher_placement: str = "copy"
    """copy: a whole teacher in every process. fsdp2: shared out over the processes. offload: the
    same, kept in host memory and moved layer by layer."""
    teacher_bits: int | None = None
    """8 or 4: quantise the teacher's layers, not its head, with bitsandbytes. None = not."""
    lora_rank: int = 0
    """Train adapters of this rank on the language model's linear layers; the rest is frozen, in
    dtype, or under fsdp2 in float32. 0 = all weights."""
    lora_alpha: float = 32.0
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

    # ---- how much ----
    steps: int = 200
    """Optimiser steps."""
    prompts_per_step: int = 16
    """Questions per step; each is answered num_generations times."""
    num_generations: int = 8
    """Completions per question, the group in which advantages are relative."""
    num_iterations: int = 1
    """Optimiser steps on the same completions; from the second on the ratio is not 1."""
    data_fraction: float = 0.0
    """Share of a step's questions that the dataset's own worked solution answers, once, with
    advantage 1, instead of the student. 1 = supervised training, between = GKD's mixture."""
    dynamic_sampling: int = 0
    """Rounds in which groups of equal rewards are replaced by other questions. 0 = they stay."""
    micro_batch: int = 32
    """Completions per forward and backward; gradients accumulate over the step."""
    rollout_batch: int = 256
    """Completions generated at once in a process, at most."""
    rollout_tokens: int | None = None
    """Tokens of those, prompts and max_completion_length together, at most. None = no such
    bound."""
    sampler: str = "transformers"
    """What generates: transformers, or vllm in the same processes."""
    vllm_memory: float = 0.3
    """Share of a GPU's memory that vLLM takes for itself."""
    max_completion_length: int = 128
    """Tokens per completion, at most."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    seed: int = 0
    """Of data order and sampling. The same seed on the same machine gives the same bits,
    on a CPU."""

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
    """So many steps in a row whose states, loss or gradient are not finite are skipped; one more
    ends the run."""

    # ---- sampling ----
    sampling_temperature: float = 1.0
    """Of generation. Other than temperature, it makes the sampled law differ from the scored
    one."""
    top_p: float = 1.0
    """Nucleus of generation. 1 = off."""
    sampler_correction: str = "none"
    """truncate: tokens sampled without a hint are weighted by the ratio of the policy's probability
    to the one they were drawn with, at most sampler_cap; for a sampler that computes in another
    way."""
    sampler_cap: float = 2.0
    """See sampler_correction."""

    # ---- rewards ----
    rewards: tuple[str, ...] = ("accuracy", "format")
    """Names from kepo.tasks.rewards.REWARDS."""
    reward_weights: tuple[float, ...] = (1.0, 1.0)
    """Their weights in the total reward, from which advantages are made."""
    overlong_buffer: int = 0
    """Over the last so many tokens that fit, the total reward falls by up to 1 (DAPO). 0 = not."""
    scale_rewards: str = "group"
    """group: advantages are divided by the group's standard deviation. none: they are not."""

    # ---- policy term (GRPO) ----
    policy_coef: float = 1.0
    """Weight of the whole policy term, penalty and bonus included. 0 = none."""
    policy_loss: str = "clip"
    """clip, cispo, sapo or reinforce."""
    importance_level: str = "token"
    """token, or sequence for GSPO's ratios."""
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
    """token_mean, sequence_mean, sum, or dr_grpo: sum / (completions * max_completion_length)."""
    temperature: float = 1.0
    """Softmax temperature of log-probabilities and divergence."""

    # ---- distillation ----
    distill_coef: float = 1.0
    """Weight of the divergence from the teacher. 0 = none."""
    beta: float = 0.5
    """0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD."""
    gate_reward: str | None = "accuracy"
    """The reward the quality gate reads: one of rewards, or total. None = distil on everything."""
    gate_threshold: float | None = 1.0
    """The gate is open where that reward is at least this. None = a soft gate: the reward, where it
    is positive, multiplies the divergence."""
    step_weights: bool = False
    """Distil less where student and teacher have drifted apart since the first step of a
    completion, a line or a tagged part of it (SOD)."""
    distill_reduction: str = "token_mean"
    """token_mean, sequence_mean or sum, over the open sequences."""

    # ---- hints ----
    hint_trigger: str = "failed"
    """failed: hints for groups of which no sample reaches hint_threshold; always: for every group;
    never."""
    hint_reward: str = "accuracy"
    """The reward by which a group has failed: one of rewards, or total."""
    hint_threshold: float = 1.0
    """See hint_trigger."""
    accept_reward: str = "accuracy"
    """A completion with a hint is a success where this reward, one of rewards or total ..."""
    accept_threshold: float = 1.0
    """... is at least this; unless it was cut off, or speaks of the hint."""
    num_hinted: int = 2
    """Worse samples of its group that hinted successes may replace."""
    max_attempts: int = 5
    """Rounds of sampling with a hint."""
    hint_with_answer: bool = False
    """Tell the teacher the right letter when it writes the hint."""
    hint_gives_answer: bool = False
    """Tell the student the right letter along with the hint."""
    leak_filter: bool = True
    """Pass over hints that state an answer (kepo.tasks.leaks says which do)."""
    hint_retries: int = 2
    """Times an unusable hint is asked for again: one that states an answer, is malformed or cut
    off, or has control tokens in it. A question without a usable one then stays without."""
    hint_temperature: float = 0.7
    """At which it is written again; the first is greedy."""
    hinted_correction: str = "none"
    """none: hinted successes are trained on as if sampled without the hint. truncate: their tokens
    are weighted by the ratio of the two probabilities, at most hinted_cap. shape: by
    g q / (q + g)^2, q the probability without the hint and g = hinted_gamma (LUFFY)."""
    hinted_cap: float = 2.0
    """See hinted_correction."""
    hinted_gamma: float = 0.1
    """See hinted_correction."""

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
    log_completions_every: int = 10
    """Steps between those whose completions are all written to completions.jsonl. 0 = never."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in _typed(values, "config").items():
            object.__setattr__(self, name, value)

    @property
    def distils(self) -> bool:
        return self.teacher is not None and self.distill_coef > 0

    @property
    def hints(self) -> bool:
        return self.teacher is not None and self.hint_trigger != "never"


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_limit",
        "eval_batch",
        "max_skipped_steps",
        "log_completions_every",
        *("changed_inputs", "rank_timeout_minutes"),
        *("device", "sharding", "rollout_gather", "teacher_placement"),
        *("gradient_checkpointing", "attn_implementation", "liger_layers", "vllm_memory"),
        *("micro_batch", "rollout_batch", "rollout_tokens", "workspace_bytes"),
    }
)
"""Settings that decide what a run writes down, or where and in what portions it computes."""


RENAMED = {"engine": "sampler"}
"""Old names of settings, which runs on disk may have."""


def load(*layers: str | Path) -> Config:
    """A Config from YAML files and presets (`presets()`), where later ones override earlier ones.

    Each layer is a path to a YAML mapping, or a preset's name. KepoConfigError names unreadable
    files, unknown keys and wrong types.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= read_layer(layer)
    return Config(**values)


def read_layer(layer: str | Path) -> dict[str, Any]:
    """The settings that one layer of ``load`` has, by name, each of its field's type."""
    path = presets().get(str(layer), Path(layer))
    words = read_mapping(path, otherwise=f"a preset, one of {', '.join(presets())}")
    return _typed(words, str(path))


def presets() -> dict[str, Path]:
    """The methods that come with the package, by name: each a few lines over the defaults."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def from_mapping(values: dict[str, Any], source: str) -> Config:
    """A Config from plain values, each checked against its field's type; lists become tuples.

    Settings of a run on disk may have old names (``RENAMED``), which are read as the new ones.
    """
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    return Config(**_typed(values, source))


def _typed(values: dict[str, Any], source: str) -> dict[str, Any]:
    """``values`` as the fields' annotations want them, paths with their ~ expanded."""
    known = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        new = "".join(f"{a} is now called {RENAMED[a]}; " for a in unknown if a in RENAMED)
        raise KepoConfigError(f"{source}: unknown keys {unknown}; {new}known are {sorted(known)}")
    found: dict[str, Any] = {}
    for name, value in values.items():
        wanted = known[name]
        try:
            found[name] = typed(value, wanted)
            if name in PATHS and found[name] != getattr(Config, name):  # "" and None: not set
                wanted = "a path"
                found[name] = expanded(found[name])
        except ValueError as error:
            raise KepoConfigError(f"{source}: {name}={sentence(value, wanted, error)}") from error
    return found
