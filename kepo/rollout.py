"""Sample completions with the live policy, and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kepo.config import Config
from kepo.data import Example
from kepo.prompts import question_prompt
from kepo.rewards import score
from kepo.vlm import VLM, Prompt


@dataclass
class Rollout:
    """One completion with its facts. It is trained on under the plain question, however it came
    about."""

    example: Example
    completion_ids: Tensor
    """(T,) int64 sampled tokens, the end token included."""
    text: str
    rewards: dict[str, float]
    hinted: bool = False
    """Sampled with a hint in the prompt."""
    truncated: bool = False
    """Reached the length limit before its end token."""


Group = list[Rollout]


def sample(
    policy: VLM,
    examples: Sequence[Example],
    config: Config,
    *,
    num_generations: int,
    prompt: Callable[[Example], str] = question_prompt,
    hinted: bool = False,
) -> list[Group]:
    """``num_generations`` scored completions for each example, in its order.

    Draws from torch's global generator. ``config`` gives length limit, temperature, top_p and the
    rewards; ``rollout_batch`` bounds how many sequences are generated at once.
    """
    per_call = max(1, config.rollout_batch // num_generations)
    groups: list[Group] = []
    for start in range(0, len(examples), per_call):
        some = examples[start : start + per_call]
        inputs = policy.encode([Prompt(prompt(example), example.image) for example in some])
        ids, mask = policy.generate(
            inputs,
            max_new_tokens=config.max_completion_length,
            temperature=config.sampling_temperature,
            top_p=config.top_p,
            num_return_sequences=num_generations,
        )
        texts = policy.decode(ids, mask)
        ended = ((ids == policy.tokenizer.eos_token_id) & mask).any(-1).tolist()
        for place, example in enumerate(some):
            rows = range(place * num_generations, (place + 1) * num_generations)
            groups.append(
                [
                    Rollout(
                        example=example,
                        completion_ids=ids[row][mask[row]].cpu(),
                        text=texts[row],
                        rewards=score(config.rewards, texts[row], example.answer, example.id),
                        hinted=hinted,
                        truncated=not ended[row],
                    )
                    for row in rows
                ]
            )
    return groups


def total_reward(rollout: Rollout, config: Config) -> float:
    """The weighted sum of a rollout's rewards."""
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    return sum(weight * rollout.rewards[name] for name, weight in pairs)
