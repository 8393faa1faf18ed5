"""Sampling: who is asked how often, and what is kept of the answer."""

from dataclasses import replace

import pytest
from toy import MALFORMED, RIGHT, WRONG, ScriptedVLM, example, rollout

from kepo.config import Config
from kepo.prompts import question_prompt
from kepo.rollout import sample, total_reward

CONFIG = Config()


def test_every_example_gets_its_group_in_order():
    policy = ScriptedVLM(lambda prompt, nth: RIGHT if "q1" in prompt and nth == 1 else WRONG)
    groups = sample(policy, [example("q0"), example("q1")], CONFIG, num_generations=3)
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
    groups = sample(policy, [example(name) for name in names], config, num_generations=2)
    assert [[r.text for r in group] for group in groups] == [[n + "0", n + "1"] for n in names]


def test_tokens_keep_the_end_and_drop_the_padding():
    policy = ScriptedVLM(lambda prompt, nth: ["abc", "a"][nth])
    long, short = sample(policy, [example("q")], CONFIG, num_generations=2)[0]
    assert long.completion_ids.tolist() == [*b"abc", 0]
    assert short.completion_ids.tolist() == [*b"a", 0]


def test_a_completion_cut_off_is_marked():
    policy = ScriptedVLM(lambda prompt, nth: ["abcdef", "abc"][nth])
    config = replace(CONFIG, max_completion_length=4)
    cut, whole = sample(policy, [example("q")], config, num_generations=2)[0]
    assert cut.truncated and cut.completion_ids.tolist() == [*b"abcd"]
    assert not whole.truncated


def test_total_reward_is_the_weighted_sum():
    config = replace(CONFIG, reward_weights=(2.0, 0.5))
    assert [total_reward(rollout(t), config) for t in (RIGHT, WRONG, MALFORMED)] == [2.5, 0.5, 0.0]
