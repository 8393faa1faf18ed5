"""The steps of `kepo train` itself, one at a time, for step.py.

Nothing of a step is written again here: the loop asks for its next step where it would count it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import kepo.loop
from benchmarks.loop.on_disk import Sizes
from benchmarks.loop.orders import Orders, Shared, keep_gradients, reward_of
from kepo.config import Config
from kepo.distributed.sharding import whole_tensor
from kepo.models.sampling import Sampled
from kepo.models.vlm import VLM
from kepo.run.metrics import read_metrics

NEVER_SAVED = 10**9


def settings(folder: Path, name: str, sizes: Sizes, changed: dict[str, Any]) -> Config:
    teacher = None if sizes.teacher is None else str(folder / "teacher")
    cuda = sizes.device == "cuda"
    usual: dict[str, Any] = dict(
        student=str(folder / "student"),
        teacher=teacher,
        distill_coef=0.0 if teacher is None else 1.0,
        gate_reward=None,  # TRL has no gate: every completion is distilled on
        hint_trigger="never",
        train_data=str(folder / "data"),
        device=sizes.device,
        # Weights in float32 under a forward in bf16, as TRL's autocast has it.
        dtype="bfloat16" if cuda else "float32",
        sharding="fsdp2" if cuda else "none",
        seed=sizes.seed,
        prompts_per_step=sizes.prompts,
        num_generations=sizes.generations,
        max_completion_length=sizes.length,
        micro_batch=sizes.micro_batch,
        steps=NEVER_SAVED,
        save_every=NEVER_SAVED,
        log_completions_every=0,
        run_dir=str(folder / f"run-{name}"),
    )
    return Config(**(usual | changed))


def run(folder: Path, name: str, sizes: Sizes, changed: dict[str, Any]) -> None:
    """Train until no further step is asked for."""
    config, orders = settings(folder, name, sizes, changed), Orders(sizes.device)
    log, shared = Path(config.run_dir) / "metrics.jsonl", Shared(folder)
    sample, update = VLM.sample, kepo.loop.update

    def steps(done: int, total: int) -> Iterator[int]:
        for step in count(1):
            if not orders.wait():
                return
            yield step
            orders.done(**numbers(read_metrics(log)[-1]))

    def sampled(policy: VLM, prompts: Sequence, params: Any, seeds: Any = None) -> Sampled:
        if not orders.first:
            return sample(policy, prompts, params, seeds)
        asked = [policy.encoder.encode([prompt]).input_ids[0].tolist() for prompt in prompts]
        each = [prompt for prompt in asked for _ in range(params.n)]
        if shared.sampled is not None:
            ids = torch.tensor(shared.take(each))
            return Sampled(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))
        found = sample(policy, prompts, params, seeds)
        for prompt, ids, mask in zip(each, found.ids, found.mask, strict=True):
            shared.keep(prompt, ids[mask].tolist())
        return found

    def updated(run: Any, step: int) -> float:
        if orders.first:
            named = run.parameters.items()
            gradients = {n: p.grad if p.grad is None else whole_tensor(p.grad) for n, p in named}
            keep_gradients(folder, name, gradients)
        return update(run, step)

    with (
        mock.patch.multiple(kepo.loop, step_bar=steps, show=lambda *_: None, update=updated),
        mock.patch.object(VLM, "sample", sampled),
    ):
        kepo.loop.train(config, rewards=[crc])


def crc(completions: list[str], **columns: Any) -> list[float]:
    return [reward_of(text) for text in completions]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return what step.py reports, from a step's line of metrics.jsonl."""
    return {
        "sampled": record["kepo/sampled_completions"] * record["completions/mean_length"],
        "trained": record["kepo/completion_tokens"],
        "rollout_seconds": record["time/rollout"],
        "teacher_seconds": record["time/teacher"],
        "loss": record["kepo/policy_loss"] + record["kepo/distill_loss"],
    }
