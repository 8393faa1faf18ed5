"""Tiny models whose heads have 64 numbers, as vLLM wants on a CPU, and the law that they sample."""

from pathlib import Path

import pytest
import torch
from transformers import TopPLogitsWarper

from kepo.digits import tiny
from kepo.miniature import tiny_models
from kepo.models.families.family import TinySize
from kepo.models.sampling import Sampled, SamplingParams
from kepo.models.vlm import VLM

SIZE = TinySize(hidden=128, layers=2, heads=2, vision_hidden=64, vision_depth=1)


def build(folder: Path, seed: int = 1, **settings) -> Path:
    """Write a model; settings are those of build_tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models._SIZES, "student", SIZE)
        tiny.build_tiny(folder, size="student", seed=seed, **settings)
    return folder


@torch.no_grad()
def apart(vlm: VLM, prompts: list, params: SamplingParams, sampled: Sampled) -> float:
    """How far log-probabilities are from the policy's, each completion in one forward, at most."""
    inputs = vlm.encode([prompt for prompt in prompts for _ in range(params.n)])
    logits = vlm.completion_hidden(inputs, sampled.ids, sampled.mask) @ vlm.head.weight.T
    logits[..., vlm.never_sampled()] = -torch.inf
    logits = logits / params.temperature
    rows = TopPLogitsWarper(params.top_p)(None, logits.flatten(0, 1))
    law = rows.view_as(logits).log_softmax(-1).gather(-1, sampled.ids[..., None])[..., 0]
    return float((law - sampled.logprobs)[sampled.mask].abs().max())
