"""Reward functions with TRL's signature: what they are given, what they may return, by name."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from toy import TASK, example

from kepo.config import Config
from kepo.errors import KepoConfigError, KepoRewardError
from kepo.tasks.environment import Environment, environment_of, with_own
from kepo.tasks.rewards import rewards_of

EXAMPLES = [example("a", columns={"ward": "b2", "answer": "A"}), example("b", answer="B")]
TEXTS = ["<answer>A</answer>", "no"]
IDS = [[1, 2, 3], [4]]


def scores(*functions):
    rewards = rewards_of(functions, TASK, Config())
    return Environment(TASK, rewards).scores(EXAMPLES, TEXTS, IDS)


def test_it_is_given_every_field_of_the_examples():
    given = {}

    def note(prompts, completions, completion_ids=None, **columns):
        given.update(columns, prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0, 1.0]

    assert scores(note) == [{"note": 0.0}, {"note": 1.0}]
    assert given["completions"] == TEXTS and given["ids"] == IDS
    assert given["prompts"] == [TASK.messages(one)[-1]["content"] for one in EXAMPLES]
    assert given["answer"] == ["A", "B"] and given["ward"] == ["b2", None]
    assert given["modality"] == ["CT", "CT"] and given["options"] == [("yes", "no")] * 2
    assert [path.name for [path] in given["images"]] == ["a.png", "b.png"]


def test_where_the_data_are_chats_so_are_prompts_and_completions():
    def note(prompts, completions, **columns):
        assert prompts[0][-1]["role"] == "user" and isinstance(prompts[0][-1]["content"], str)
        return [len(completion[0]["content"]) for completion in completions]

    chat = [example("a", columns={"messages": [{"role": "user", "content": "?"}]})]
    env = Environment(TASK, {"note": note})
    assert env.scores(chat, ["four"], [[1]]) == [{"note": 4.0}]


def test_a_function_without_columns_is_given_what_it_names():
    def short(completions, ward):
        return [len(text) + (one is not None) for text, one in zip(completions, ward, strict=True)]

    assert scores(short) == [{"short": 19.0}, {"short": 2.0}]


def test_none_leaves_a_completion_out_and_numbers_of_any_library_count():
    def some(completions, **columns):
        return [None, np.float32(0.5)]

    def many(completions, **columns):
        return torch.tensor([1, 0])

    assert scores(some, many) == [{"some": None, "many": 1.0}, {"some": 0.5, "many": 0.0}]


def test_async_rewards_wait_together_also_within_a_running_loop():
    arrived = []
    both = threading.Barrier(2, timeout=20)

    def waiting(name):
        async def reward(completions, **columns):
            arrived.append(name)
            await asyncio.to_thread(both.wait)  # passed only if both are under way
            return [1.0, 2.0]

        reward.__name__ = name
        return reward

    async def notebook():
        return scores(waiting("one"), waiting("two"), "accuracy")

    found = asyncio.run(notebook())
    assert found == [
        {"one": 1.0, "two": 1.0, "accuracy": 1.0},
        {"one": 2.0, "two": 2.0, "accuracy": 0.0},
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0], "rewards: 'bad' returned 1 numbers; expected 2, one for each completion"),
        (None, "rewards: 'bad' returned None; expected a list of 2 numbers"),
        (7, "rewards: 'bad' returned 7; expected a list of 2 numbers"),
        ([1.0, "x"], "rewards: 'bad' returned 'x' on example 'b'; expected a finite number"),
        ([float("nan"), 1.0], "rewards: 'bad' returned nan on example 'a'"),
    ],
)
def test_anything_else_is_said_with_the_reward_and_the_example(value, words):
    def bad(completions, **columns):
        return value

    with pytest.raises(KepoRewardError) as caught:
        scores(bad)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_an_exception_names_the_reward_and_the_examples(kind):
    def plain(completions, **columns):
        raise TimeoutError("no judge")

    async def later(completions, **columns):
        raise TimeoutError("no judge")

    function = plain if kind == "plain" else later
    words = f"rewards: '{function.__name__}' raised TimeoutError on examples 'a', 'b': no judge"
    with pytest.raises(KepoRewardError) as caught:
        scores(function)
    assert str(caught.value) == words


# ---- by name ----


def test_a_function_of_a_file_is_called_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def concise(completions, **c): return [1 for _ in completions]"
    )
    env = environment_of(Config(rewards=("accuracy", "mine.py:concise")))
    assert list(env.rewards) == ["accuracy", "concise"]
    assert env.scores(EXAMPLES, TEXTS, IDS)[1] == {"accuracy": 0.0, "concise": 1.0}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("acuracy",), "rewards has 'acuracy'; expected one of accuracy, format, overlong, or"),
        (("nowhere.py:f",), "rewards='nowhere.py:f': there is no file nowhere.py in "),
        (("accuracy", "json:accuracy"), "rewards: two of them are called 'accuracy'; rename one"),
        (("json:__name__",), "rewards: '__name__' is 'json'; expected a function"),
    ],
)
def test_a_name_that_leads_nowhere_is_said(names, words):
    with pytest.raises(KepoConfigError) as caught:
        environment_of(Config(rewards=names))
    assert str(caught.value).startswith(words)


def test_functions_from_python_take_the_places_of_the_configs():
    def mine(completions, **columns):
        return [0.5 for _ in completions]

    config, env = with_own(Config(), None, ["format", mine, "overlong"])
    assert config.rewards == ("format", "mine", "overlong")
    assert config.reward_weights == (1.0, 1.0, 1.0) and list(env.rewards) == list(config.rewards)
    kept, _ = with_own(Config(reward_weights=(2.0, 1.0)), None, ["format", mine])
    assert kept.reward_weights == (2.0, 1.0)
    same, env = with_own(Config(), None, None)
    assert same == Config() and list(env.rewards) == ["accuracy", "format"]
