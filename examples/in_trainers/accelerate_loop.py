"""GRPO in a loop of one's own with accelerate, on a tiny model that learns to say small numbers.

    python examples/in_trainers/accelerate_loop.py          # a few seconds on a CPU
    torchrun --nproc-per-node=2 examples/in_trainers/accelerate_loop.py

The loop is the same under `accelerate launch` with DDP, FSDP2 or DeepSpeed.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from kepo_kernels import FusedHead, fused_grpo_loss

PROMPT, LENGTH, VOCABULARY = 2, 10, 32


# ---- shown in docs/trainers.md
def train(accelerator, model, optimizer, batches):
    FusedHead.install(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    micro, batches = accelerator.gradient_accumulation_steps, iter(batches)

    def loss_of(tokens, ids, mask, advantages):
        how = dict(targets=ids[:, 1:], advantages=advantages, weights=mask[:, 1:] / tokens)
        return model(ids, loss=lambda hidden, head: fused_grpo_loss(hidden[:, :-1], head, **how))

    while len(group := list(islice(batches, micro))) == micro:  # of one step
        tokens = accelerator.reduce(sum(x["mask"][:, 1:].sum() for x in group), reduction="mean")
        for batch in group:  # backward divides by micro
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(tokens.clamp(min=1) / micro, **batch))
                optimizer.step()
                optimizer.zero_grad()


# ---- end


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, pad_token_id=0)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, eos_token_id=None))


def completions(model: LlamaForCausalLM, device: torch.device, rounds: int, seen: list[float]):
    """Micro-batches of completions that the model samples as it is now, and their advantages."""
    for _ in range(rounds):
        prompts = torch.ones(64, PROMPT, dtype=torch.long, device=device)
        how = dict(max_length=LENGTH, do_sample=True, top_k=0)
        ids = model.generate(prompts, attention_mask=prompts, **how)
        rewards = (ids[:, PROMPT:] < VOCABULARY // 2).float().mean(1)  # small numbers
        seen.append(float(rewards.mean()))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        mask = (torch.arange(LENGTH, device=device) >= PROMPT).float().expand_as(ids)
        for place in torch.arange(64, device=device).split(16):
            yield dict(ids=ids[place], mask=mask[place], advantages=advantages[place])


def main(rounds: int) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, seen = tiny().to(accelerator.device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(accelerator.process_index)  # processes sample completions of their own
    train(accelerator, model, optimizer, completions(model, accelerator.device, rounds, seen))
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    rewards = main(parser.parse_args().rounds)
    print(f"mean reward of the first round {rewards[0]:.2f}, of the last {rewards[-1]:.2f}")
