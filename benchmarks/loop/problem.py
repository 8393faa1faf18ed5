"""What phases.py measures: random models held as the loop holds them, pictures, completions."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from kepo.config import Config
from kepo.data.example import Example
from kepo.digits.dataset import QUESTION
from kepo.digits.tiny import build_tokenizer
from kepo.miniature.tiny_models import CONTROL_TOKENS
from kepo.models.encoding import Encoder
from kepo.models.families.family import TinySize
from kepo.models.families.processors import pillow_processor_class
from kepo.models.families.qwen3_vl import PATCH, tiny_config
from kepo.models.families.qwen_vl import pictures_of
from kepo.models.vlm import VLM
from kepo.objective.batch import Batch, collate
from kepo.planner.known_models import known_model
from kepo.planner.memory import Prompts
from kepo.rollout.prompts import prompt_of
from kepo.rollout.types import Rollout
from kepo.run import roles
from kepo.tasks.multiple_choice import MultipleChoice

HEAD_SIZE = 32  # of an attention head


class Size(NamedTuple):
    """Of a model of ours; released ones go by their names."""

    hidden: int
    layers: int

    def __str__(self) -> str:
        return f"{self.hidden},{self.layers}"


class Vocabulary:
    """A tokenizer that knows as many ids as the head has rows, but for the last one. That is its
    end token, which is never sampled, so every completion is as long as it may be."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = rows - 1

    def __len__(self) -> int:
        return self.eos_token_id

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._tokenizer(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class Problem:
    """Models, and the questions of one step."""

    policy: VLM
    teacher: VLM
    config: Config
    examples: list[Example]
    prompts: Prompts
    """Their sizes, as the planner is told."""
    plain_ids: int
    """Ids from 0 on that are text."""

    @property
    def completions(self) -> int:
        return self.config.prompts_per_step * self.config.num_generations

    def batch(self, rate: float) -> Batch:
        """A step's completions, random but for the rewards; the gate of this share is open."""
        config, count = self.config, self.completions
        generator = torch.Generator().manual_seed(config.seed)
        shape = (count, config.max_completion_length)
        ids = torch.randint(0, self.plain_ids, shape, generator=generator)
        order = torch.randperm(count, generator=generator).tolist()
        opened = set(order[: round(rate * count)])
        asked = [example for example in self.examples for _ in range(config.num_generations)]
        rollouts = [
            Rollout(
                example=asked[place],
                prompt=prompt_of(MultipleChoice(), asked[place]),
                completion_ids=ids[place],
                text="",
                rewards={"accuracy": float(place in opened), "format": float(place % 2)},
            )
            for place in range(count)
        ]
        size = config.num_generations
        return collate([rollouts[at : at + size] for at in range(0, count, size)], config)


def build(folder: Path, args: argparse.Namespace) -> Problem:
    """Models on the device, loaded by the loop's own functions but for their weights, which are
    drawn; the folder gets pictures, and the configs of models of ours."""
    device = torch.device(args.device or "cpu")
    config = settings(folder, args, device)
    tokenizer = build_tokenizer()
    models = {
        name: random_model(getattr(args, name), args, tokenizer, device, args.seed + number)
        for number, name in enumerate(("student", "teacher"))
    }
    by_path = {config.student: models["student"], config.teacher: models["teacher"]}
    for path, model in by_path.items():
        if Path(path).parent == folder:  # not a released model: the planner reads it here
            model.config.save_pretrained(path)
    rows = len(models["student"].get_output_embeddings().weight)
    encoder = Encoder(
        Vocabulary(tokenizer, rows),
        pictures_of(image_processor(), models["student"].config.image_token_id),
    )
    with mock.patch.multiple(
        roles,
        read_model=lambda path, dtype, **settings: by_path[path],
        load_encoder=lambda path, model: encoder,
    ):
        policy = roles.load_policy(config, device)
        teacher = roles.load_teacher(config, device)
    examples = [
        Example(
            id=str(number),
            question=QUESTION,
            options=("2", "5", "8", "11"),
            answer="A",
            images=(picture(folder / f"{number}.png", args.picture, number),),
            modality="",
            question_type="",
        )
        for number in range(args.prompts)
    ]
    plain = min(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    problem = Problem(policy, teacher, config, examples, Prompts(), plain)
    shown = policy.encode(problem.batch(1.0).prompts)
    images = int(shown.mm_token_type_ids[0].sum())
    return replace(problem, prompts=Prompts(shown.input_ids.shape[1] - images, images))


def settings(folder: Path, args: argparse.Namespace, device: torch.device) -> Config:
    def path(name: str) -> str:
        model = getattr(args, name)
        return model if isinstance(model, str) else str(folder / name)

    return Config(
        student=path("student"),
        teacher=path("teacher"),
        device=str(device),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        lora_rank=args.lora,
        gradient_checkpointing=args.checkpointing,
        prompts_per_step=args.prompts,
        num_generations=args.generations,
        micro_batch=args.micro_batch,
        max_completion_length=args.tokens,
        hint_trigger="never",
        seed=args.seed,
        # What opens the gate earns nothing, so the policy term is the same at every gate rate.
        gate_reward="accuracy",
        rewards=("accuracy", "format"),
        reward_weights=(0.0, 1.0),
    )


def random_model(
    shape: Size | str, args: argparse.Namespace, tokenizer: Any, device: torch.device, seed: int
) -> Any:
    """A released model's shape, or one of ours with ``args.vocab`` rows, most of them padding;
    drawn where it is to be, in the dtype that it is to have."""
    from transformers import AutoModelForImageTextToText

    if isinstance(shape, str):
        config = known_model(shape).config()
        for name in ("image", "video", "vision_start", "vision_end"):
            token = f"<|{name}{'' if name.startswith('vision') else '_pad'}|>"
            setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    else:
        config = tiny_config(
            tokenizer,
            TinySize(
                hidden=shape.hidden,
                layers=shape.layers,
                heads=shape.hidden // HEAD_SIZE,
                vision_hidden=shape.hidden // 2,
                vision_depth=1,
                tied=args.tied,
            ),
        )
        config.text_config.vocab_size = args.vocab
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def image_processor() -> Any:
    """As the released models have it: no picture of these sizes is resized."""
    return pillow_processor_class()(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 4096**2},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def picture(path: Path, sides: tuple[int, int], seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*sides, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def parameters(vlm: VLM) -> int:
    return sum(p.numel() for p in vlm.model.parameters())
