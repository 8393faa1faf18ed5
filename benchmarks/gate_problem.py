"""Problems for bench_gate.py and bench_step.py: one training step's models and completions, by gate
rate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kepo.batch import Batch, collate
from kepo.config import Config
from kepo.data import load_omnimedvqa
from kepo.digits import MODALITIES, write_digits
from kepo.rollout import Rollout
from kepo.tiny import CONTROL_TOKENS, build_tiny, model_config
from kepo.vlm import VLM

HEAD_SIZE = 32  # of an attention head


class Size(NamedTuple):
    hidden: int
    layers: int


@dataclass(frozen=True)
class Problem:
    policy: VLM
    teacher: VLM
    config: Config
    batches: dict[float, Batch]
    """The completions of a step by the share of them whose gate is open."""
    prompt_tokens: int
    seen: list[int]
    """Completion tokens of each call of the teacher's backbone so far."""


def build(folder: Path, args: argparse.Namespace, *, tied: bool = False) -> Problem:
    """Models, images and completions of one step, all random but for the rewards.

    tied: input and output embeddings of both models are one matrix.
    """
    build_tiny(folder / "parts", size="student", seed=args.seed)
    parts = VLM.load(folder / "parts")  # for its tokenizer and image processor
    policy = random_model(parts, args.student, args.vocab, args.seed, tied)
    teacher = random_model(parts, args.teacher, args.vocab, args.seed + 1, tied)
    policy.model.train()
    teacher.model.requires_grad_(False)
    seen: list[int] = []
    count_tokens(teacher, seen)

    write_digits(folder / "data", train=args.prompts, test=1, seed=args.seed)
    examples = load_omnimedvqa(folder / "data" / "train", modalities=(next(iter(MODALITIES)),))
    config = Config(
        teacher="random",
        prompts_per_step=args.prompts,
        num_generations=args.generations,
        micro_batch=args.micro_batch,
        max_completion_length=args.tokens,
        # What opens the gate earns nothing, so the policy term is the same at every gate rate.
        gate_reward="accuracy",
        rewards=("accuracy", "format"),
        reward_weights=(0.0, 1.0),
    )
    generator = torch.Generator().manual_seed(args.seed)
    plain = min(parts.tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    count = args.prompts * args.generations
    ids = torch.randint(0, plain, (count, args.tokens), generator=generator)
    order = torch.randperm(count, generator=generator).tolist()
    batches = {}
    for rate in args.rate:
        opened = set(order[: round(rate * count)])
        rollouts = [
            Rollout(
                example=examples[place // args.generations],
                completion_ids=ids[place],
                text="",
                rewards={"accuracy": float(place in opened), "format": float(place % 2)},
            )
            for place in range(count)
        ]
        groups = [rollouts[at : at + args.generations] for at in range(0, count, args.generations)]
        batches[rate] = collate(groups, config)
    prompts = policy.encode(batches[args.rate[0]].prompts)
    return Problem(policy, teacher, config, batches, prompts.input_ids.shape[1], seen)


def random_model(parts: VLM, size: Size, vocab: int, seed: int, tied: bool = False) -> VLM:
    """A random fp32 Qwen3-VL with that many rows in its vocabulary, most of them padding."""
    from transformers import Qwen3VLForConditionalGeneration

    config = model_config(
        parts.tokenizer,
        hidden=size.hidden,
        layers=size.layers,
        heads=size.hidden // HEAD_SIZE,
        vision_hidden=size.hidden // 2,
        vision_depth=1,
        tied=tied,
    )
    config.text_config.vocab_size = vocab
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).float().eval()
    return VLM(model, parts.encoder)


def count_tokens(teacher: VLM, seen: list[int]) -> None:
    """Have every call of the teacher's backbone add its completion tokens to ``seen``."""
    backbone = teacher.completion_hidden

    def counted(inputs, ids, mask):
        seen.append(int(mask.sum()))
        return backbone(inputs, ids, mask)

    teacher.completion_hidden = counted


def parameters(vlm: VLM) -> int:
    return sum(p.numel() for p in vlm.model.parameters())
