"""Stand-ins for models: a policy and a teacher that say what a test scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from kepo.config import Config
from kepo.data import Example
from kepo.rewards import score
from kepo.rollout import Rollout

RIGHT = "<think>x</think><answer>A</answer>"
WRONG = "<think>x</think><answer>B</answer>"
MALFORMED = "B"
EOS = 0


def example(name: str) -> Example:
    return Example(name, f"question {name}?", ("yes", "no"), "A", Path(f"/{name}.png"), "CT", "x")


def rollout(text: str, name: str = "q", config: Config | None = None, **facts: object) -> Rollout:
    names = (config or Config()).rewards
    ids = torch.tensor([*text.encode(), EOS])
    return Rollout(example(name), ids, text, score(names, text, "A", name), **facts)


class ScriptedVLM:
    """Has `encode`, `generate` and `decode` of a VLM; `answer(prompt, nth_time)` is what it says.

    `seen` lists every prompt it was asked to complete, once per completion.
    """

    def __init__(self, answer: Callable[[str, int], str]):
        self.answer = answer
        self.seen: list[str] = []
        self.tokenizer = SimpleNamespace(eos_token_id=EOS)

    def encode(self, prompts):
        return [prompt.text for prompt in prompts]

    def generate(self, inputs, *, max_new_tokens, num_return_sequences=1, **sampling):
        texts = []
        for prompt in inputs:
            for _ in range(num_return_sequences):
                texts.append(self.answer(prompt, self.seen.count(prompt)))
                self.seen.append(prompt)
        rows = [[*text.encode(), EOS][:max_new_tokens] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
        mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
        return ids, mask

    def decode(self, ids, mask):
        return [
            bytes(t for t in row[keep].tolist() if t != EOS).decode()
            for row, keep in zip(ids, mask, strict=True)
        ]
