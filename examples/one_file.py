"""KEPO on a model of transformers, in one file: sampling, hints, gate, one fused loss, optimiser.

    python examples/one_file.py   # half a minute on a CPU

Two tiny Llamas, made on the spot, add two numbers of one digit. The teacher was shown all sums; the
student only some, so it has seen what an answer looks like and knows few of them. KEPO then trains
it by reward, with the teacher's help where that is worth having: its distribution on right answers
(the gate), and its hints where every sample is wrong. Nothing of the package `kepo` is used.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kepo_kernels import fused_kepo_loss

# ---- the task: "7+8=" -> "15."; with a hint, "7+8?5=" tells the last digit ----

TEXT = "0123456789+?=."
END, PAD = TEXT.index("."), len(TEXT)
LENGTH = 3  # of the longest answer, its end included
QUESTIONS = [(a, b) for a in range(10) for b in range(10)]


def ids_of(text: str) -> list[int]:
    return [TEXT.index(letter) for letter in text]


def prompt(question: tuple[int, int], hint: str = "") -> list[int]:
    a, b = question
    return ids_of(f"{a}+{b}?{hint}=" if hint else f"{a}+{b}=")


def said(ids: Tensor) -> str:
    """The answer up to its end; what never ended is no answer."""
    text = "".join((TEXT + " ")[i] for i in ids.tolist())
    return text.split(".")[0] if "." in text else ""


def reward(question: tuple[int, int], answer: str) -> float:
    return float(answer == str(sum(question)))


# ---- models ----


def tiny_model(seed: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TEXT) + 1,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def states(model: LlamaForCausalLM, prompts: Tensor, completions: Tensor) -> Tensor:
    """The last hidden states (B, T, H) from which the tokens of the completions are predicted."""
    whole = torch.cat([prompts, completions], dim=1)
    hidden = model.model(input_ids=whole).last_hidden_state
    return hidden[:, prompts.shape[1] - 1 : -1]


def supervised(model: LlamaForCausalLM, questions: list, steps: int, seed: int) -> None:
    """Teach a model to answer these questions, and to read hints about them."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for hinted in (False, True):
            asked = [draw.choice(questions) for _ in range(32)]
            prompts = torch.tensor([prompt(q, str(sum(q) % 10) if hinted else "") for q in asked])
            answers = [ids_of(f"{sum(q)}.") for q in asked]
            ids = torch.tensor([answer + [PAD] * (LENGTH - len(answer)) for answer in answers])
            logits = model.lm_head(states(model, prompts, ids))
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids.flatten(), ignore_index=PAD
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, number: int, greedy: bool = False) -> Tensor:
    """(B * number, LENGTH) tokens, those of a prompt one after another; PAD after the end."""
    told = prompts.repeat_interleave(number, 0)
    chosen = dict(do_sample=False) if greedy else dict(do_sample=True, top_k=0, top_p=1.0)
    whole = model.generate(
        told, attention_mask=torch.ones_like(told), max_new_tokens=LENGTH, **chosen
    )
    ids = torch.full((len(told), LENGTH), PAD)
    ids[:, : whole.shape[1] - told.shape[1]] = whole[:, told.shape[1] :]
    return ids


def accuracy(model: LlamaForCausalLM) -> float:
    answers = sample(model, torch.tensor([prompt(q) for q in QUESTIONS]), 1, greedy=True)
    pairs = zip(QUESTIONS, answers, strict=True)
    return sum(reward(q, said(ids)) for q, ids in pairs) / len(QUESTIONS)


# ---- KEPO ----


def rescue(student, teacher, questions: list, ids: Tensor, rewards: Tensor) -> int:
    """Where every sample fails, sample again with a hint of the teacher's, and put a success in the
    place of a failure. It is trained on as an answer to the plain question."""
    rescued = 0
    for place in (rewards.sum(-1) == 0).nonzero().flatten().tolist():
        question = questions[place]
        [told] = sample(teacher, torch.tensor([prompt(question)]), 1, greedy=True)
        if not (hint := said(told)[-1:]) or not hint.isdigit():
            continue
        again = sample(student, torch.tensor([prompt(question, hint)]), ids.shape[1])
        for answer in again:
            if reward(question, said(answer)):
                ids[place, 0], rewards[place, 0] = answer, 1.0
                rescued += 1
                break
    return rescued


def train(student, teacher, steps: int, prompts_per_step: int = 32, group: int = 8) -> None:
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        # Sample a group of answers to each question, and judge them.
        questions = [draw.choice(QUESTIONS) for _ in range(prompts_per_step)]
        asked = torch.tensor([prompt(q) for q in questions])
        ids = sample(student, asked, group).view(prompts_per_step, group, LENGTH)
        rewards = torch.tensor(
            [[reward(q, said(x)) for x in row] for q, row in zip(questions, ids, strict=True)]
        )
        sampled = rewards.mean().item()
        rescued = rescue(student, teacher, questions, ids, rewards)

        # An answer's advantage is relative to its group; the gate opens for right answers.
        advantages = (rewards - rewards.mean(-1, keepdim=True)) / (
            rewards.std(-1, keepdim=True) + 1e-4
        )
        gate = (rewards >= 1.0).float()
        ids = ids.flatten(0, 1)
        prompts = asked.repeat_interleave(group, 0)
        mask = (ids != PAD).float()

        # One pass over the logits: GRPO on all answers, the teacher's divergence on right ones.
        with torch.no_grad():
            teacher_hidden = states(teacher, prompts, ids)
        loss = fused_kepo_loss(
            states(student, prompts, ids),
            student.lm_head.weight,
            ids.masked_fill(ids == PAD, 0),
            advantages.flatten(),
            teacher_hidden,
            teacher.lm_head.weight,
            gate=gate.flatten(),
            completion_mask=mask,
            distill_coef=5.0,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3}  reward {sampled:.2f}  gate {gate.mean():.2f}  rescued {rescued}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    teacher, student = tiny_model(seed=1, hidden=96), tiny_model(seed=2, hidden=64)
    supervised(teacher, QUESTIONS, steps=400, seed=1)
    some = random.Random(3).sample(QUESTIONS, 50)
    supervised(student, some, steps=100, seed=2)
    print(f"teacher {accuracy(teacher):.2f}, student {accuracy(student):.2f}")
    train(student.eval(), teacher.eval(), steps)
    print(f"student after {steps} steps of KEPO: {accuracy(student):.2f}")
