"""The steps of TRL's own trainers, one at a time, for step.py: GRPOTrainer and DistillationTrainer.

They get what ours gets: the same model, prompts, pictures, rewards, micro-batches and AdamW, and
their own sampling, processing and losses, untouched, but that in the first step they train on
everybody's completions. Gradient checkpointing is off, as in ours. `fused`: their steps by our
adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop.on_disk import Sizes
from benchmarks.loop.orders import Orders, Shared, keep_gradients, reward_of
from kepo.data.load import load_examples
from kepo.models.reading import hide_transformers_bars
from kepo.rollout.prompts import prompt_of
from kepo.tasks.multiple_choice import MultipleChoice

BETA = 0.5  # of the divergence, as ours


def grpo(
    folder: Path, name: str, sizes: Sizes, changed: dict[str, Any], fused: bool = False
) -> None:
    """Take GRPOTrainer's steps; all of its releases from 1.15 on have their fused head on."""
    from trl import GRPOConfig, GRPOTrainer

    def crc(completions: list, **_: Any) -> list[float]:
        return [reward_of(completion[0]["content"]) for completion in completions]

    settings = GRPOConfig(
        **common(folder, name, sizes),
        num_generations=sizes.generations,
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        **changed,
    )
    trainer = GRPOTrainer(
        model=model_in(folder / "student"),
        reward_funcs=crc,
        args=settings,
        train_dataset=questions(folder, 1),
        processing_class=processor(folder / "student"),
    )
    if fused:
        from kepo_kernels.integrations.trl import fuse_head

        fuse_head(trainer)
    take_steps(trainer, folder, name, Orders(sizes.device), lambda ids: (ids, None))


def distillation(folder: Path, name: str, sizes: Sizes, fused: bool = False) -> None:
    """Take DistillationTrainer's steps, which sample one completion of each prompt; a prompt is
    there as often as GRPO samples it."""
    from trl import DistillationConfig, DistillationTrainer

    kind = DistillationTrainer
    if fused:
        from kepo_kernels.integrations.trl import KepoDistillationTrainer as kind
    trainer = kind(
        model=model_in(folder / "student"),
        teacher_model=model_in(folder / "teacher"),
        args=DistillationConfig(**common(folder, name, sizes), beta=BETA),
        train_dataset=questions(folder, sizes.generations),
        processing_class=processor(folder / "student"),
    )
    take_steps(trainer, folder, name, Orders(sizes.device), lambda ids: ids)


def common(folder: Path, name: str, sizes: Sizes) -> dict[str, Any]:
    """Return the settings of both trainers: those of ours, by the names that TRL gives them."""
    return dict(
        output_dir=str(folder / f"run-{name}"),
        per_device_train_batch_size=sizes.micro_batch,
        gradient_accumulation_steps=sizes.completions // sizes.micro_batch,
        max_steps=10**9,
        max_completion_length=sizes.length,
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=sizes.device == "cuda",
        use_cpu=sizes.device == "cpu",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=sizes.seed,
    )


def model_in(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    hide_transformers_bars()
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)


def processor(path: Path) -> Any:
    """Return transformers' own processor of these models without its part for videos, which alone
    needs torchvision; `AutoProcessor` would ask for it."""
    from transformers import AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    from kepo.models.families.processors import image_processor_class

    class Still(Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **settings: Any):
            super().__init__(image_processor, tokenizer, **settings)

    tokenizer = AutoTokenizer.from_pretrained(path)
    pictures = image_processor_class().from_pretrained(path)
    return Still(pictures, tokenizer, chat_template=tokenizer.chat_template)


def questions(folder: Path, copies: int) -> Any:
    """Return the questions that ours reads, in a dataset; each ``copies`` times."""
    from datasets import Dataset, Features, Image, List, Value

    examples, _ = load_examples(folder / "data")
    asked = [prompt_of(MultipleChoice(), example) for example in examples for _ in range(copies)]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt.text}] for prompt in asked],
            "images": [[str(path) for path in prompt.images] for prompt in asked],
        },
        features=Features({"prompt": [message], "images": List(Image())}),
    )


def take_steps(
    trainer: Any,
    folder: Path,
    name: str,
    orders: Orders,
    as_generated: Callable[[list[list[int]]], Any],
) -> None:
    """Train until no further step is asked for. as_generated: what ``_generate_single_turn``
    returns for completions."""
    from transformers import TrainerCallback

    shared, step = Shared(folder), dict.fromkeys(FACTS, 0.0)
    generate, score = trainer._generate_single_turn, trainer._generate_and_score_completions
    compute_loss, clip = trainer.compute_loss, trainer.accelerator.clip_grad_norm_

    def generated(prompt_ids: list, *rest: Any, **more: Any) -> Any:
        if orders.first and shared.sampled is not None:
            return as_generated(shared.take(prompt_ids))
        found = generate(prompt_ids, *rest, **more)
        ids = found[0] if isinstance(found, tuple) else found
        if orders.first:
            for prompt, completion in zip(prompt_ids, ids, strict=True):
                shared.keep(prompt, completion)
        return found

    def scored(inputs: list) -> Any:
        started = orders.now()
        found = score(inputs)
        step["rollout_seconds"] += orders.now() - started
        step["sampled"] += int(found["completion_mask"].sum())
        return found

    def loss_of(model: Any, inputs: dict, **more: Any) -> Any:
        loss = compute_loss(model, inputs, **more)
        step["loss"] += float(loss.detach())
        step["trained"] += int(inputs["completion_mask"].sum())
        return loss

    def clipped(parameters: Any, *rest: Any, **more: Any) -> Any:
        if orders.first:
            named = trainer.model.named_parameters()
            keep_gradients(folder, name, {n: p.grad for n, p in named})
        return clip(parameters, *rest, **more)

    class Ordered(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not orders.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            orders.done(**step)
            step.update(dict.fromkeys(FACTS, 0.0))
            control.should_training_stop = not orders.wait()

    trainer._generate_single_turn, trainer._generate_and_score_completions = generated, scored
    trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = loss_of, clipped
    trainer.add_callback(Ordered())
    trainer.train()


FACTS = ("sampled", "trained", "rollout_seconds", "teacher_seconds", "loss")
