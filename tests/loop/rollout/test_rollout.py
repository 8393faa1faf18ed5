"""Sampling: who is asked how often, and what is kept of the answer; worked solutions; rewards."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from toy import (
    ENV,
    MALFORMED,
    RIGHT,
    WRONG,
    ScriptedVLM,
    drawn_logprob,
    example,
    hinted_prompt,
    question_prompt,
    rollout,
)

from kepo.config import Config
from kepo.models.encoding import Prompt
from kepo.rollout.rollouts import demonstrations, sample
from kepo.rollout.types import reward_of, total_reward, total_rewards
from kepo.tasks.environment import environment_of
from kepo.tasks.rewards import overlong_penalty

CONFIG = Config()


def test_every_example_gets_its_group_in_order():
    policy = ScriptedVLM(lambda prompt, nth: RIGHT if "q1" in prompt and nth == 1 else WRONG)
    groups = sample(policy, [example("q0"), example("q1")], ENV, CONFIG, num_generations=3)
    assert [[r.example.id for r in group] for group in groups] == [["q0"] * 3, ["q1"] * 3]
    assert [[r.rewards["accuracy"] for r in group] for group in groups] == [[0, 0, 0], [0, 1, 0]]
    assert (
        policy.seen == [question_prompt(example("q0"))] * 3 + [question_prompt(example("q1"))] * 3
    )
    assert not any(r.hinted or r.truncated for group in groups for r in group)


@pytest.mark.parametrize("rollout_batch", [1, 4, 6, 100])
def test_batching_of_generation_changes_nothing(rollout_batch):
    names = [f"q{i}" for i in range(5)]
    policy = ScriptedVLM(lambda prompt, nth: prompt[9:11] + str(nth))
    config = replace(CONFIG, rollout_batch=rollout_batch)
    groups = sample(
        policy,
        [example(name) for name in names],
        ENV,
        config,
        num_generations=2,
        hints=[f"hint for {name}" for name in names],
    )
    assert [[r.text for r in group] for group in groups] == [[n + "0", n + "1"] for n in names]
    assert [[r.hint for r in group] for group in groups] == [[f"hint for {n}"] * 2 for n in names]
    prompts = [hinted_prompt(example(name), f"hint for {name}") for name in names]
    assert policy.seen == [prompt for prompt in prompts for _ in range(2)]


class Measured(ScriptedVLM):
    """Keeps the prompts of each call; a prompt is as long as its text."""

    def __init__(self):
        super().__init__(lambda prompt, nth: RIGHT)
        self.calls = []

    def encode(self, prompts):
        rows = [torch.ones(len(prompt.text)) for prompt in prompts]
        return SimpleNamespace(input_ids=pad_sequence(rows, batch_first=True).long())

    def sample(self, prompts, params, seeds=None):
        self.calls.append([prompt.text for prompt in prompts])
        return self.generate(self.calls[-1], replace(params, max_tokens=64))


@pytest.mark.parametrize("most", [1, 400, 1000, 2500, 10**6])
@pytest.mark.parametrize("rollout_batch", [2, 8, 256])
def test_tokens_generated_at_once_are_bounded(most, rollout_batch):
    config = replace(
        CONFIG, rollout_tokens=most, rollout_batch=rollout_batch, max_completion_length=30
    )
    lengths = [1, 200, 3, 4, 90, 5, 6, 7, 8]
    examples = [example(f"q{place}", question="x" * n) for place, n in enumerate(lengths)]
    sampler = Measured()
    groups = sample(sampler, examples, ENV, config, num_generations=2)
    prompts = sorted(map(question_prompt, examples), key=len)
    asked = [text for call in sampler.calls for text in call]
    assert asked == prompts or len(sampler.calls) == 1  # those of one length class together
    assert sorted(asked) == sorted(prompts)
    assert [group[0].example for group in groups] == examples

    def fits(call):
        padded = max(map(len, call)) + 30
        return 2 * len(call) <= rollout_batch and 2 * len(call) * padded <= most

    assert all(fits(call) or len(call) == 1 for call in sampler.calls)
    pairs = zip(sampler.calls, sampler.calls[1:], strict=False)
    assert not any(fits([*call, after[0]]) for call, after in pairs)  # none is cut short


def test_tokens_keep_the_end_and_drop_the_padding():
    policy = ScriptedVLM(lambda prompt, nth: ["abc", "a"][nth])
    long, short = sample(policy, [example("q")], ENV, CONFIG, num_generations=2)[0]
    assert long.completion_ids.tolist() == [*b"abc", 0]
    assert short.completion_ids.tolist() == [*b"a", 0]
    for kept in (long, short):  # a number per token, of the prompt that was shown
        plain = [drawn_logprob("", place) for place in range(len(kept.completion_ids))]
        assert kept.sampler_logprobs.tolist() == pytest.approx(plain)


def test_the_law_with_the_hint_is_what_is_kept_of_a_hinted_completion():
    policy = ScriptedVLM(lambda prompt, nth: "abc")
    (r,) = sample(policy, [example("q")], ENV, CONFIG, num_generations=1, hints=["left"])[0]
    told = [drawn_logprob("Hint: left", place) for place in range(4)]
    assert r.hinted and r.sampler_logprobs.tolist() == pytest.approx(told)


def test_a_rollout_carries_the_plain_question_whatever_was_shown():
    asked, policy = example("q"), ScriptedVLM(lambda prompt, nth: "abc")
    plain = Prompt(question_prompt(asked), asked.images)
    (told,) = sample(policy, [asked], ENV, CONFIG, num_generations=1, hints=["left"])[0]
    (own,) = sample(policy, [asked], ENV, CONFIG, num_generations=1)[0]
    (given,) = demonstrations(policy, [asked], ENV, CONFIG)
    assert policy.seen == [hinted_prompt(asked, "left"), plain.text]
    assert told.prompt == own.prompt == given.prompt == plain


def test_every_completion_keeps_its_own_numbers():
    class Numbered(ScriptedVLM):
        def generate(self, inputs, params):
            drawn = super().generate(inputs, params)
            rows = torch.arange(float(len(drawn.ids)))[:, None]
            return drawn._replace(logprobs=-rows.expand_as(drawn.ids))

    policy = Numbered(lambda prompt, nth: ["abc", "a"][nth])
    groups = sample(policy, [example("a"), example("b")], ENV, CONFIG, num_generations=2)
    kept = [r.sampler_logprobs.tolist() for group in groups for r in group]
    assert kept == [[-0.0] * 4, [-1.0] * 2, [-2.0] * 4, [-3.0] * 2]


def test_a_completion_cut_off_is_marked():
    policy = ScriptedVLM(lambda prompt, nth: ["abcdef", "abc"][nth])
    config = replace(CONFIG, max_completion_length=4)
    cut, whole = sample(policy, [example("q")], ENV, config, num_generations=2)[0]
    assert cut.truncated and cut.completion_ids.tolist() == [*b"abcd"]
    assert not whole.truncated


# ---- worked solutions ----


def test_demonstrations_are_the_worked_answers_and_nobody_sampled_them():
    policy = ScriptedVLM(lambda prompt, nth: WRONG)
    first, second = demonstrations(
        policy, [example("a", rationale="x"), example("b", answer="B")], ENV, CONFIG
    )
    assert (first.text, second.text) == (RIGHT, "<answer>B</answer>")
    assert first.completion_ids.tolist() == [*RIGHT.encode(), 0]
    assert second.completion_ids.tolist() == [*b"<answer>B</answer>", 0]
    assert first.rewards == {"accuracy": 1.0, "format": 1.0}
    assert second.rewards == {"accuracy": 1.0, "format": 0.0}
    for r in (first, second):
        assert r.sampler_logprobs is None and not r.hinted and not r.truncated
    assert policy.seen == [] and demonstrations(policy, [], ENV, CONFIG) == []


def test_a_demonstration_too_long_is_cut_and_says_so():
    config = replace(CONFIG, max_completion_length=5)
    (r,) = demonstrations(ScriptedVLM(lambda p, n: ""), [example("a")], ENV, config)
    assert r.truncated and r.completion_ids.tolist() == [*b"<answ"]
    # It is judged by what is left: a gate on accuracy must not open for half an answer.
    assert r.text == "<answ" and r.rewards == {"accuracy": 0.0, "format": 0.0}


# ---- rewards ----


def test_total_reward_is_the_weighted_sum():
    config = replace(CONFIG, reward_weights=(2.0, 0.5))
    assert [total_reward(rollout(t), config) for t in (RIGHT, WRONG, MALFORMED)] == [2.5, 0.5, 0.0]


def test_a_reward_is_read_by_its_name_or_as_the_total():
    r = rollout(WRONG)
    assert [reward_of(r, name, CONFIG) for name in ("accuracy", "format", "total")] == [0, 1, 1]


def test_a_reward_that_does_not_apply_is_in_no_sum_and_reaches_no_threshold():
    r = rollout(RIGHT)
    r.rewards = {"accuracy": None, "format": 1.0}
    assert total_reward(r, CONFIG) == 1.0 and reward_of(r, "accuracy", CONFIG) == -math.inf
    r.rewards = {"accuracy": None, "format": None}
    assert total_reward(r, CONFIG) == 0.0


@pytest.mark.parametrize(
    ("length", "fine"),
    [(1, 0.0), (12, 0.0), (13, 0.125), (16, 0.5), (20, 1.0), (33, 1.0)],
)
def test_overlong_completions_are_fined_in_a_line_to_one(length, fine):
    # eq. 13 of DAPO with L_max = 20, L_cache = 8: 0 up to 12, then (12 - length) / 8, then -1
    config = replace(CONFIG, max_completion_length=20, overlong_buffer=8)
    assert overlong_penalty(length, config) == -fine


def test_the_fine_counts_tokens_and_is_part_of_the_total_and_only_there():
    names = ("accuracy", "format", "overlong")
    config = replace(CONFIG, max_completion_length=40, overlong_buffer=10, rewards=names)
    config = replace(config, reward_weights=(1.0, 1.0, 1.0))
    policy = ScriptedVLM(lambda prompt, nth: [RIGHT, "<answer>A</answer>"][nth])
    group = sample(policy, [example("q")], environment_of(config), config, num_generations=2)[0]
    assert [len(r.completion_ids) for r in group] == [35, 19]  # the end token counts
    assert [r.rewards["overlong"] for r in group] == [-0.5, 0.0]
    assert total_rewards([group], config).tolist() == [[1.5, 1.0]]
    assert [reward_of(r, "accuracy", config) for r in group] == [1.0, 1.0]
    (unfined,) = sample(policy, [example("r")], ENV, CONFIG, num_generations=1)[0]
    assert "overlong" not in unfined.rewards
