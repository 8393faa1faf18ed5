"""Runs in two processes: three steps of SGD by TRL's distillation, and by ours.

torchrun ... tests/support/trl_distilled.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from benchmarks.trl.tiny_models import prompts


def three_steps(kind, folder: Path) -> dict:
    from trl import DistillationConfig

    settings = DistillationConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=8,
        max_steps=3,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )
    models = str(folder / "pupil"), str(folder / "teacher")
    made = kind(*models, args=settings, train_dataset=prompts(32))
    before = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    made.train()
    after = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    log = [{k: x[k] for k in ("loss", "entropy")} for x in made.state.log_history if "loss" in x]
    return dict(log=log, before=before, after=after)


if __name__ == "__main__":
    from trl import DistillationTrainer

    from kepo_kernels.integrations.trl import KepoDistillationTrainer

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = [three_steps(kind, folder) for kind in (DistillationTrainer, KepoDistillationTrainer)]
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
