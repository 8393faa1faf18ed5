"""TRL's own GRPO losses against ours on the same batch: loss, gradients and metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.trl.tiny_models import batch, length, prompts, write_model
from kepo_kernels.compute import gemm

ACCUMULATED = 2


@dataclass(frozen=True)
class Case:
    """A setting of GRPOConfig and what a batch has besides."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    old: bool = True
    """Whether the batch has log-probabilities of an older policy."""
    ratio: str = ""
    """"token" or "sequence": vLLM's importance sampling correction."""
    tools: bool = False
    evaluated: bool = False
    model: str = "llama"
    falls_back: bool = False
    lora: bool = False
    rounding: float = 0.0
    """What 16 bits may add to a difference of gradients."""


CLIP = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
GSPO = {"importance_sampling_level": "sequence"}
CASES = [
    *(Case(kind, {"loss_type": kind}) for kind in (*CLIP, "cispo", "sapo")),
    Case("vespo", {"loss_type": "vespo"}, falls_back=True),
    *(Case(f"{x}, on-policy", {"loss_type": x}, old=False) for x in ("grpo", "cispo", "sapo")),
    *(Case(f"GSPO, {x}", {"loss_type": x} | GSPO) for x in ("grpo", "dapo", "luspo")),
    *(Case(f"GSPO, {x}", {"loss_type": x} | GSPO) for x in ("cispo", "sapo")),
    Case("cispo, epsilon_high 5", {"loss_type": "cispo", "epsilon_high": 5.0}),
    Case("epsilon_high 0.4", {"epsilon_high": 0.4}),
    *(Case(f"{x}, delta 1.5", {"loss_type": x, "delta": 1.5}) for x in ("grpo", "dapo")),
    Case("delta 1.1", {"delta": 1.1}, falls_back=True),
    Case("k3, bias-corrected", {"beta": 0.1}),
    Case("k3", {"beta": 0.1, "use_bias_correction_kl": False}),
    Case("k3, bias-corrected, GSPO", {"beta": 0.1, "loss_type": "grpo"} | GSPO),
    *(Case(f"importance sampling, {x}", ratio=x) for x in ("token", "sequence")),
    Case("importance sampling, token, k3", {"beta": 0.1}, ratio="token"),
    Case("vespo, importance sampling", {"loss_type": "vespo"}, ratio="token", falls_back=True),
    *(Case(f"{x}, entropy_coef", {"loss_type": x, "entropy_coef": 0.1}) for x in ("grpo", "dapo")),
    Case("bnpo, entropy_coef -0.1", {"loss_type": "bnpo", "entropy_coef": -0.1}),
    Case("use_adaptive_entropy", {"use_adaptive_entropy": True, "entropy_coef": 0.1}),
    Case("temperature 0.7", {"temperature": 0.7, "loss_type": "grpo"}),
    Case("tools", tools=True),
    Case("tools, GSPO, entropy_coef", GSPO | {"entropy_coef": 0.1}, tools=True),
    Case("evaluation", evaluated=True),
    Case("top_entropy_quantile 0.5", {"top_entropy_quantile": 0.5}, falls_back=True),
    Case("off_policy_mask_threshold", {"off_policy_mask_threshold": 0.1}, falls_back=True),
    Case("mixture of experts", model="experts", falls_back=True),
    Case("cast_lm_head_to_fp32", {"cast_lm_head_to_fp32": True}),
    Case("LoRA, k3", {"beta": 0.1}, lora=True),
    Case("bf16", {"bf16": True}, rounding=0.02),
    Case("bf16, cast_lm_head_to_fp32", {"bf16": True, "cast_lm_head_to_fp32": True}),
]


def trainer(case: Case, kind: Callable[..., Any], folder: Path, **more: Any) -> Any:
    """Make a trainer of TRL's or ours, always with the same weights."""
    from trl import GRPOConfig

    path = folder / case.model
    if not path.exists():
        write_model(path, kind=case.model)
    usual = dict(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=30,
        gradient_accumulation_steps=ACCUMULATED,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    if case.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = kind(
            str(path),
            length,
            args=GRPOConfig(**usual | case.settings),
            train_dataset=prompts(),
            **more,
        )
    if case.ratio:
        made.use_vllm = made.vllm_importance_sampling_correction = True
    made._last_world_entropy = 0.1  # adaptive entropy has measured once
    made.current_gradient_accumulation_steps = ACCUMULATED
    made.accelerator.gradient_state._set_sync_gradients(True)
    made.model.train(not case.evaluated)
    return made


def inputs_of(case: Case, made: Any) -> dict[str, Any]:
    """Make the batch of a case; its older log-probabilities are near those of the model."""
    given = batch()
    drift, reference, ratio = (given.pop(x) for x in ("drift", "reference_drift", "ratio"))
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    with torch.no_grad():
        logits = made.model(ids, attention_mask=mask).logits[:, -drift.size(1) - 1 : -1]
        now = (logits / made.temperature).log_softmax(-1)
        now = now.gather(-1, given["completion_ids"].unsqueeze(-1)).squeeze(-1)
    now = now * given["completion_mask"]
    if case.old:
        given["old_per_token_logps"] = now + drift * given["completion_mask"]
    given["ref_per_token_logps"] = now + reference * given["completion_mask"]
    if case.ratio:
        given["importance_sampling_ratio"] = ratio if case.ratio == "token" else ratio[:, :1]
        given["sampling_per_token_logps"] = now
    if case.tools:
        given["tool_mask"] = torch.ones_like(given["completion_mask"])
        given["tool_mask"][:, 2::3] = 0
    return given


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradient: torch.Tensor
    metrics: dict[str, list[float]]


def outcome(made: Any, given: dict[str, Any]) -> Outcome:
    """Compute loss and gradients, and what is logged beside them."""
    made.model.zero_grad()
    loss = made._compute_loss(made.model, given)
    loss.backward()
    gradients = [p.grad.flatten() for p in made.model.parameters() if p.grad is not None]
    metrics = made._metrics["train" if made.model.training else "eval"]
    return Outcome(float(loss.detach()), torch.cat(gradients).double(), dict(metrics))


@dataclass(frozen=True)
class Difference:
    """Relative to the largest of TRL's own."""

    loss: float
    gradient: float
    metrics: float


def difference(found: Outcome, expected: Outcome) -> Difference:
    names = expected.metrics.keys()
    off = [abs(found.metrics[x][-1] - expected.metrics[x][-1]) for x in names]
    return Difference(
        abs(found.loss - expected.loss) / abs(expected.loss),
        float((found.gradient - expected.gradient).norm() / expected.gradient.norm()),
        max((x for x in off if x == x), default=0.0),
    )


@contextmanager
def logits_like_trl() -> Iterator[None]:
    """Give our logits the dtype of the states on every device, as TRL's have it.

    On GPUs, and on CPUs without bf16 instructions, ours of bf16 states are fp32.
    """
    with patch.object(gemm, "default_logits_dtype", lambda dtype, _: dtype):
        yield


@logits_like_trl()
def differences(case: Case, folder: Path) -> dict[str, tuple[str, Difference]]:
    """Return what fuse_head and KepoGRPOTrainer compute against TRL, each with its way."""
    from trl import GRPOTrainer

    from kepo_kernels.integrations.trl import KepoGRPOTrainer, fuse_head

    theirs = trainer(case, GRPOTrainer, folder)
    given = inputs_of(case, theirs)
    expected = outcome(theirs, given)
    fused = fuse_head(trainer(case, GRPOTrainer, folder))
    joint = trainer(case, KepoGRPOTrainer, folder)
    gate = {"kepo_gate": torch.zeros(4), "kepo_open_tokens": torch.tensor(0.0)}
    way = "fallback" if joint._uncovered else "joint loss"
    return {
        "fuse_head": ("head", difference(outcome(fused, given), expected)),
        "KepoGRPOTrainer": (way, difference(outcome(joint, given | gate), expected)),
    }
