"""A stand-in for vLLM: the calls, keywords and results that the sampler uses, answers from a table.

Written from vLLM's sources. A keyword or a tag that vLLM does not know is an error here, too.
Asleep it forgets its weights, as vLLM does at level 2, and its tokens depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import make_dataclass
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any

import torch

__version__ = "0.0 (a stand-in)"
ENGINE_SETTINGS = {
    *("model", "dtype", "tensor_parallel_size", "distributed_executor_backend", "seed"),
    *("gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "enable_sleep_mode"),
    *("logprobs_mode", "generation_config", "limit_mm_per_prompt", "mm_processor_kwargs"),
    *("trust_remote_code", "load_format", "enforce_eager"),
}
EngineArgs = make_dataclass("EngineArgs", sorted(ENGINE_SETTINGS))
DEFAULTS = dict(
    n=1,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    seed=None,
    max_tokens=16,
    logprobs=None,
    stop_token_ids=None,
    logit_bias=None,
    detokenize=True,
    skip_special_tokens=True,
)


class SamplingParams(SimpleNamespace):
    __signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in DEFAULTS])

    def __init__(self, **settings: Any):
        if unknown := set(settings) - set(DEFAULTS):
            raise TypeError(f"Unexpected keyword argument {sorted(unknown)}")
        super().__init__(**{**DEFAULTS, **settings})
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}")


class Model:
    """Two parameters; the second is not in every checkpoint."""

    def __init__(self):
        self.held: dict[str, torch.Tensor | None] = {"shift": None, "other": None}

    def named_parameters(self):
        return iter(self.held.items())

    def load_weights(self, weights):
        loaded = set()
        for name, tensor in weights:
            self.held[name] = tensor.clone()
            loaded.add(name)
        return loaded


class LLM:
    """`answer(prompt ids, params, shift)` gives tokens, their log-probabilities, finish_reason."""

    answer: Callable[..., tuple[list[int], list[float], str]]
    expand: Callable[[dict, dict], list[int]]

    def __init__(self, **settings: Any):
        if unknown := set(settings) - ENGINE_SETTINGS:
            raise TypeError(f"Unexpected keyword argument {sorted(unknown)}")
        self.settings = settings
        self.environment = dict(os.environ)
        self.model = Model()
        self.calls: list[str] = []
        self.asked: list[tuple[dict, SamplingParams]] = []
        self.awake = {"weights", "kv_cache"}
        self.llm_engine = SimpleNamespace(
            vllm_config="vllm_config",
            reset_encoder_cache=lambda: self.calls.append("reset_encoder_cache"),
            engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")),
        )

    def sleep(self, level: int = 1):
        self.calls.append(f"sleep {level}")
        self.awake.clear()
        if level == 2:
            self.model.held = dict.fromkeys(self.model.held)

    def wake_up(self, tags: list[str] | None = None):
        assert set(tags) <= {"weights", "kv_cache"}
        self.calls.append("wake_up " + " ".join(tags))
        self.awake |= set(tags)

    def apply_model(self, function):
        assert "weights" in self.awake, "weights are not mapped"
        self.calls.append("apply_model")
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert self.awake == {"weights", "kv_cache"} and not use_tqdm
        assert len(prompts) == len(sampling_params)
        self.calls.append("generate")
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            self.asked.append((prompt, params))
            shift = int(self.model.held["shift"])
            tokens, logprobs, reason = type(self).answer(prompt, params, shift)
            laws = [
                {token: SimpleNamespace(logprob=value, rank=1, decoded_token=None)}
                for token, value in zip(tokens, logprobs, strict=True)
            ]
            completion = SimpleNamespace(
                index=0,
                token_ids=tuple(tokens),
                logprobs=laws if params.logprobs is not None else None,
                finish_reason=reason,
                stop_reason=None,
            )
            expanded = type(self).expand(prompt, self.settings)
            outputs.append(SimpleNamespace(prompt_token_ids=expanded, outputs=[completion]))
        return outputs
