"""Runs in two processes: TRL's GRPO loss of a sharded model, by our adapters.

torchrun ... tests/support/trl_sharded.py FOLDER ADAPTER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fused_in_two import as_accelerate_does

from benchmarks.trl.grpo_equality import ACCUMULATED, Case, inputs_of, trainer
from kepo_kernels.integrations.trl import KepoGRPOTrainer, fuse_head

CASE = Case("grpo", {"loss_type": "grpo", "entropy_coef": 0.1, "beta": 0.1}, tools=True)
"""A loss whose normaliser is a process's own: two processes with one batch are one."""
KNOWING = "knowing"


def made(adapter: str, folder: Path):
    if adapter == "fuse_head":
        from trl import GRPOTrainer

        return fuse_head(trainer(CASE, GRPOTrainer, folder))
    teacher = str(folder / KNOWING)
    return trainer(CASE, KepoGRPOTrainer, folder, teacher_model=teacher, gate_reward="length")


def given(one) -> dict:
    found = inputs_of(CASE, one)
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0])
    # Of all processes, each of which has this batch.
    opened = (gate.unsqueeze(1) * found["completion_mask"]).sum() * one.accelerator.num_processes
    return found | {"kepo_gate": gate, "kepo_open_tokens": opened * ACCUMULATED}


def gradients(one, model, inputs: dict) -> dict[str, torch.Tensor]:
    """By name, whole."""
    one._compute_loss(model, inputs).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, adapter = Path(sys.argv[1]), sys.argv[2]
    one = made(adapter, folder)
    inputs = given(one)
    sharded = as_accelerate_does(one.model)
    assert any(type(p).__name__ == "DTensor" for p in sharded.parameters())
    one.model = sharded
    found = gradients(one, sharded, inputs)
    if one.accelerator.is_main_process:
        torch.save(found, folder / f"{adapter}.pt")
    torch.distributed.destroy_process_group()
