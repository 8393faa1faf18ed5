"""Tiny models, a tokenizer and batches for TRL's trainers, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
PROMPT, LENGTH, BATCH = 5, 24, 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w93 with a padding and an end token."""
    words = {"<pad>": 0, "<end>": 1} | {f"w{n}": n + 2 for n in range(VOCABULARY - 2)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def write_model(
    folder: Path, seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = 32, kind: str = "llama"
) -> str:
    """Write a random model and its tokenizer; return the folder's name, by which TRL loads it."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model: Any
    if kind == "experts":
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=hidden)
        router = dict(output_router_logits=True, router_aux_loss_coef=0.1, head_dim=hidden // 2)
        settings = sizes | shape | ids | experts | router
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, initializer_range=0.2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **shape, **ids, initializer_range=0.2))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(count: int = 8) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"w{n} w{n + 1} w{n + 2}" for n in range(count)]})


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward."""
    return [float(len(ids)) for ids in completion_ids]


def batch(seed: int = 3) -> dict[str, Any]:
    """What GRPOTrainer's generation leaves of a micro-batch: completions of all lengths, drifted
    log-probabilities, advantages of both signs and 0."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=draw)

    lengths = torch.tensor([LENGTH, 15, 19, 1])
    ids = torch.randint(2, VOCABULARY, (BATCH, PROMPT + LENGTH), generator=draw)
    prompt_mask = torch.ones(BATCH, PROMPT, dtype=torch.long)
    prompt_mask[1, :2] = 0
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, PROMPT:] * mask,
        "completion_mask": mask,
        "advantages": torch.tensor([1.2, -0.7, 0.9, -0.3]),
        "num_items_in_batch": torch.tensor(130),
        "drift": noise(BATCH, LENGTH, scale=0.5),
        "reference_drift": noise(BATCH, LENGTH, scale=0.3),
        "ratio": noise(BATCH, LENGTH, scale=0.2).exp(),
    }
