"""A tiny Qwen3-VL in TRL's trainers: models, processor, questions with pictures of several sizes.

torchrun ... tests/support/trl_vlm.py FOLDER    trains with KepoGRPOTrainer, and three steps with
each adapter and TRL's own, and writes what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.loop.trl_steps import model_in, processor
from kepo.digits.tiny import build_tiny

WANTED = range(128)
SIDES = (32, 64, 48, 80)


def write(folder: Path) -> None:
    build_tiny(folder / "student", size="student", seed=0)
    build_tiny(folder / "teacher", size="teacher", seed=1)


def questions(count: int = 8) -> Any:
    """Every other one has two pictures; pictures differ in size."""
    from datasets import Dataset

    def picture(number: int) -> Image.Image:
        return Image.new("RGB", (SIDES[number % 4], 32), (30 * number % 256, 90, 200))

    rows = [[picture(n + k) for k in range(1 + n % 2)] for n in range(count)]
    asked = [[{"role": "user", "content": f"What is {n} + 2?"}] for n in range(count)]
    return Dataset.from_dict({"prompt": asked, "images": rows})


def share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(one in WANTED for one in ids) / len(ids) for ids in completion_ids]


def half(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that opens every other completion, and knows nothing of some."""
    return [(1.0, None, 1.0, 0.0)[n % 4] for n in range(len(completion_ids))]


def trainer(kind: Any, folder: Path, **more: Any) -> Any:
    from trl import GRPOConfig

    settings = dict(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        seed=1,
    )
    settings |= more.pop("settings", {})
    return kind(
        model_in(folder / "student"),
        [share, half],
        args=GRPOConfig(**settings),
        train_dataset=questions(),
        processing_class=processor(folder / "student"),
        **more,
    )


def train(folder: Path) -> None:
    from kepo_kernels.integrations.trl import KepoGRPOTrainer

    how = dict(teacher_model=model_in(folder / "teacher"), gate_reward="half", distill_coef=0.05)
    settings = dict(max_steps=30, gradient_accumulation_steps=2, learning_rate=1e-2)
    made = trainer(KepoGRPOTrainer, folder, settings=settings, **how)
    made.train()
    steps = {name: three_steps(kind, folder) for name, kind in adapters().items()}
    found = dict(log=made.state.log_history, weights=checksum(made), steps=steps)
    name = f"rank{os.environ.get('RANK', 0)}.json"
    (folder / name).write_text(json.dumps(found), encoding="utf-8")


def adapters() -> dict[str, Any]:
    from trl import GRPOTrainer

    from kepo_kernels.integrations.trl import KepoGRPOTrainer, fuse_head

    def fused(*args: Any, **kwargs: Any) -> Any:
        return fuse_head(GRPOTrainer(*args, **kwargs))

    return {"trl": GRPOTrainer, "fuse_head": fused, "joint": KepoGRPOTrainer}


def three_steps(kind: Any, folder: Path) -> dict[str, Any]:
    """Train by plain SGD, so that a gradient of twice the size shows, from the same seeds."""
    settings = dict(optim="sgd", learning_rate=0.5, max_grad_norm=0.0, max_steps=3, beta=0.05)
    made = trainer(kind, folder, settings=settings | {"gradient_accumulation_steps": 2})
    made.train()
    return dict(log=made.state.log_history[:3], weights=checksum(made))


def checksum(made: Any) -> list[float]:
    """A number of each parameter."""
    draw = torch.Generator().manual_seed(0)
    parameters = [p.detach().double() for p in made.model.parameters()]
    return [float((p * torch.randn(p.shape, generator=draw)).sum()) for p in parameters]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
