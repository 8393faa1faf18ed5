"""TRL's own distillation against ours on the same batch: loss, entropy, gradients and products."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.trl.grpo_equality import ACCUMULATED, Difference, Outcome, difference
from benchmarks.trl.tiny_models import batch, prompts, write_model


@dataclass(frozen=True)
class Case:
    beta: float
    temperature: float = 1.0
    evaluated: bool = False
    tools: bool = False

    @property
    def name(self) -> str:
        kind = {0.0: "KL(teacher|student)", 1.0: "KL(student|teacher)"}
        words = [kind.get(self.beta, f"JSD, beta {self.beta}")]
        words += [f"temperature {self.temperature}"] * (self.temperature != 1.0)
        words += ["evaluation"] * self.evaluated + ["tools"] * self.tools
        return ", ".join(words)


CASES = [
    *(Case(beta) for beta in (0.0, 1.0, 0.5, 0.1)),
    *(Case(beta, temperature=0.7) for beta in (0.0, 1.0, 0.5)),
    Case(0.5, evaluated=True),
    Case(0.5, tools=True),
]


def trainer(case: Case, kind: Callable[..., Any], folder: Path, **more: Any) -> Any:
    """Make a trainer of TRL's or ours, always with the same weights; the teacher is wider."""
    from trl import DistillationConfig

    if not (folder / "pupil").exists():
        write_model(folder / "pupil", seed=0)
        write_model(folder / "teacher", seed=5, hidden=48)
    arguments = DistillationConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATED,
        beta=case.beta,
        temperature=case.temperature,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = dict(teacher_model=str(folder / "teacher")) | more
        made = kind(str(folder / "pupil"), args=arguments, train_dataset=prompts(), **given)
    made.current_gradient_accumulation_steps = ACCUMULATED
    made.model.train(not case.evaluated)
    return made


def outcome(made: Any, case: Case) -> Outcome:
    given = {k: v for k, v in batch().items() if "drift" not in k and k not in ("ratio",)}
    if case.tools:
        given["tool_mask"] = torch.ones_like(given["completion_mask"])
        given["tool_mask"][:, 2::3] = 0
    made.model.zero_grad()
    loss = made.compute_loss(made.model, given)
    loss.backward()
    gradients = [p.grad.flatten() for p in made.model.parameters() if p.grad is not None]
    metrics = made._metrics["train" if made.model.training else "eval"]
    return Outcome(float(loss.detach()), torch.cat(gradients).double(), dict(metrics))


def differences(case: Case, folder: Path) -> dict[str, tuple[str, Difference]]:
    from trl import DistillationTrainer

    from kepo_kernels.integrations.trl import KepoDistillationTrainer

    expected = outcome(trainer(case, DistillationTrainer, folder), case)
    found = outcome(trainer(case, KepoDistillationTrainer, folder), case)
    return {"KepoDistillationTrainer": ("one product", difference(found, expected))}


# ---- the work of the heads ----


@dataclass(frozen=True)
class Shape:
    """A problem as small as its ratio of widths: the sheet's has 2048 and 5120."""

    rows: int = 256
    vocabulary: int = 4096
    student: int = 128
    teacher: int = 320


@dataclass(frozen=True)
class Work:
    flops: int
    seconds: float


def problem(shape: Shape) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw) * size[-1] ** -0.25

    return dict(
        hidden=random(1, shape.rows, shape.student).requires_grad_(),
        weight=random(shape.vocabulary, shape.student).requires_grad_(),
        teacher_hidden=random(1, shape.rows, shape.teacher),
        teacher_weight=random(shape.vocabulary, shape.teacher),
    )


def by_trl(x: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    """Compute DistillationTrainer's own loss of hidden states."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(x["hidden"].shape[:2])
    heads = x["weight"], x["teacher_weight"]
    return _chunked_divergence_loss(x["hidden"], x["teacher_hidden"], *heads, mask, beta)[0]


def by_us(x: dict[str, torch.Tensor], beta: float) -> torch.Tensor:
    """Compute what KepoDistillationTrainer does of hidden states."""
    from kepo_kernels import fused_gated_kd_loss

    states = x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"]
    return fused_gated_kd_loss(*states, beta=beta, return_stats=True)[0]


def product(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Return the operations of total += a @ b, from their shapes."""
    return 2 * a[0] * a[1] * b[1]


def work(compute: Callable[..., torch.Tensor], beta: float, shape: Shape, times: int = 3) -> Work:
    """Count the multiplications of loss and gradients, and take the least of some times."""
    x = problem(shape)
    in_place = {torch.ops.aten.addmm_: product}  # which torch's own counter leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        compute(x, beta).backward()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        compute(x, beta).backward()
        seconds.append(time.perf_counter() - start)
    return Work(counted.get_total_flops(), min(seconds, default=0.0))
