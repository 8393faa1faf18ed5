"""Sample completions with the live policy, or take the dataset's own, and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kepo.config import TOTAL, Config
from kepo.data import Example
from kepo.prompts import hinted_prompt, question_prompt, worked_answer
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
    sampler_logprobs: Tensor | None = None
    """(T,) fp32 log-probabilities under the law they were drawn from, prompt and hint included.
    None: nobody sampled it."""
    hint: str | None = None
    """What stood in the prompt beside the question."""
    truncated: bool = False
    """Reached the length limit before its end token."""

    @property
    def hinted(self) -> bool:
        return self.hint is not None


Group = list[Rollout]


def sample(
    policy: VLM,
    examples: Sequence[Example],
    config: Config,
    *,
    num_generations: int,
    hints: Sequence[str] | None = None,
) -> list[Group]:
    """``num_generations`` scored completions for each example, in its order.

    hints: one per example, shown with the question. Draws from torch's global generator. ``config``
    gives length limit, temperature, top_p and the rewards; ``rollout_batch`` bounds how many
    sequences are generated at once.
    """
    per_call = max(1, config.rollout_batch // num_generations)
    groups: list[Group] = []
    for start in range(0, len(examples), per_call):
        some = examples[start : start + per_call]
        told: Sequence[str | None] = [None] * len(some)
        if hints is not None:
            told = hints[start : start + per_call]
        inputs = policy.encode(
            [Prompt(_text(e, hint, config), e.image) for e, hint in zip(some, told, strict=True)]
        )
        ids, mask, logprobs = policy.generate(
            inputs,
            max_new_tokens=config.max_completion_length,
            temperature=config.sampling_temperature,
            top_p=config.top_p,
            num_return_sequences=num_generations,
        )
        texts = policy.decode(ids, mask)
        ended = ((ids == policy.tokenizer.eos_token_id) & mask).any(-1).tolist()
        ids, mask, logprobs = ids.cpu(), mask.cpu(), logprobs.cpu()
        for place, (example, hint) in enumerate(zip(some, told, strict=True)):
            rows = range(place * num_generations, (place + 1) * num_generations)
            groups.append(
                [
                    Rollout(
                        example=example,
                        completion_ids=ids[row][mask[row]],
                        text=texts[row],
                        rewards=_rewards(texts[row], int(mask[row].sum()), example, config),
                        sampler_logprobs=logprobs[row][mask[row]],
                        hint=hint,
                        truncated=not ended[row],
                    )
                    for row in rows
                ]
            )
    return groups


def demonstrations(policy: VLM, examples: Sequence[Example], config: Config) -> list[Rollout]:
    """The dataset's own worked solution of each example, as a scored completion."""
    if not examples:
        return []
    texts = [worked_answer(example) for example in examples]
    ids, mask = (x.cpu() for x in policy.encode_completions(texts))
    limit = config.max_completion_length
    rollouts = []
    cut = policy.decode(ids[:, :limit], mask[:, :limit])  # what is trained on is what is judged
    for row, example in enumerate(examples):
        tokens = ids[row][mask[row]]
        kept = tokens[:limit]
        rollouts.append(
            Rollout(
                example=example,
                completion_ids=kept,
                text=cut[row],
                rewards=_rewards(cut[row], len(kept), example, config),
                truncated=len(tokens) > limit,
            )
        )
    return rollouts


def total_reward(rollout: Rollout, config: Config) -> float:
    """The weighted sum of a rollout's rewards, less what an overlong one is fined."""
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    total = sum(weight * rollout.rewards[name] for name, weight in pairs)
    return total + rollout.rewards.get("overlong", 0.0)


def reward_of(rollout: Rollout, name: str, config: Config) -> float:
    """The reward of that name, or the total."""
    return total_reward(rollout, config) if name == TOTAL else rollout.rewards[name]


def total_rewards(groups: Sequence[Group], config: Config) -> Tensor:
    """(P, G) fp32 total rewards of groups of one size."""
    rewards = [[total_reward(rollout, config) for rollout in group] for group in groups]
    return torch.tensor(rewards).reshape(len(groups), -1)


def _text(example: Example, hint: str | None, config: Config) -> str:
    if hint is None:
        return question_prompt(example)
    return hinted_prompt(example, hint, config.hint_gives_answer)


def _rewards(text: str, length: int, example: Example, config: Config) -> dict[str, float]:
    rewards = score(config.rewards, text, example.answer, example.id)
    if config.overlong_buffer:
        rewards["overlong"] = overlong_penalty(length, config)
    return rewards


def overlong_penalty(length: int, config: Config) -> float:
    """DAPO's soft punishment (Yu et al. 2025, eq. 13): 0 up to the buffer, then in a line to -1."""
    start = config.max_completion_length - config.overlong_buffer
    return -min(1.0, max(0, length - start) / config.overlong_buffer)
