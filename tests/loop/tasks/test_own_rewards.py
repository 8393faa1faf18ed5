"""Reward functions with TRL's signature: what they are given, what they may return, by name."""

import asyncio
import re
import sys
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
    said, _, line = str(caught.value).rpartition(" (")
    assert said == words and re.fullmatch(r"test_own_rewards.py, line \d+\)", line)


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


@pytest.mark.parametrize(
    "value", [{0: 1.0, 1: 0.0}, {0.0, 1.0}, "10", np.float32(1)], ids=["dict", "set", "text", "0d"]
)
def test_what_has_no_order_is_no_list_of_rewards(value):
    with pytest.raises(
        KepoRewardError, match=r"rewards: 'loose' returned .*; expected a list of 2"
    ):
        rewards = {"loose": lambda completions, **columns: value}
        Environment(TASK, rewards).scores(EXAMPLES, TEXTS, IDS)


def test_a_generator_is_a_list_and_its_error_names_the_reward():
    def lazy(completions, **columns):
        return (float(text.index("A")) for text in completions)

    with pytest.raises(KepoRewardError, match="rewards: 'lazy' raised ValueError on examples 'a'"):
        scores(lazy)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError("late")])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_is_no_exception_does_not_end_the_run_without_a_word(kind, error):
    def plain(completions, **columns):
        raise error

    async def later(completions, **columns):
        raise error

    function = plain if kind == "plain" else later
    with pytest.raises(
        KepoRewardError, match=f"'{function.__name__}' raised {type(error).__name__}"
    ):
        scores(function)


def test_an_error_is_one_line_also_where_it_cannot_say_what_it_is():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def long(completions, **columns):
        raise ValueError("x" * 9999 + "\nmore")

    def mute(completions, **columns):
        raise Mute

    for function in (long, mute):
        with pytest.raises(KepoRewardError) as caught:
            scores(function)
        assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_a_column_that_the_data_lack_is_said_beside_those_they_have():
    def exact(completions, gold):
        return [0.0] * len(completions)

    with pytest.raises(KepoRewardError, match=r"it asks for gold; the data have .*completions"):
        scores(exact)


def test_what_one_function_does_to_its_lists_reaches_nobody_else():
    ids = [[1, 2, 3], [4]]

    def careless(completions, completion_ids, answer, **columns):
        completion_ids[0].clear()
        completions.clear()
        answer.append("C")
        return [0.0, 0.0]

    def after(completions, completion_ids, answer, **columns):
        return [len(completions) + len(answer), len(completion_ids[0])]

    env = Environment(TASK, {"careless": careless, "after": after})
    assert [one["after"] for one in env.scores(EXAMPLES, TEXTS, ids)] == [4.0, 3.0]
    assert ids == IDS


def test_a_column_called_self_does_not_meet_an_object():
    class Judge:
        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

    asked = [example("a", columns={"self": 1, "cls": 2, "columns": 3})]
    assert Environment(TASK, {"judge": Judge()}).scores(asked, ["x"], [[1]]) == [{"judge": 1.0}]

    def own(self, columns):
        return [self[0] + columns[0]]

    assert Environment(TASK, {"own": own}).scores(asked, ["x"], [[1]]) == [{"own": 4.0}]


def test_one_function_alone_is_a_list_of_it():
    def mine(completions, **columns):
        return [1.0] * len(completions)

    for given in (mine, "format"):
        config, env = with_own(Config(), None, given)
        assert list(env.rewards) == list(config.rewards) == [getattr(given, "__name__", given)]
        assert config.reward_weights == (1.0,)


def test_rewards_without_weights_have_a_weight_of_one_each():
    assert Config(rewards=("accuracy", "format", "f.py:g")).reward_weights == (1.0, 1.0, 1.0)
    assert Config(rewards=("f.py:g",)).reward_weights == (1.0,)


def test_a_file_finds_its_neighbours_also_when_it_is_called(tmp_path):
    (tmp_path / "late_neighbour.py").write_text("VALUE = 0.25\n")
    (tmp_path / "lazy.py").write_text(
        "def lazy(completions, **columns):\n"
        "    from late_neighbour import VALUE\n"
        "    return [VALUE] * len(completions)\n"
    )
    assert scores(f"{tmp_path}/lazy.py:lazy") == [{"lazy": 0.25}] * 2


def test_a_package_is_found_in_the_working_directory_by_the_command_too(tmp_path, monkeypatch):
    (tmp_path / "here_only.py").write_text("def half(completions, **k):\n    return [0.5, 0.5]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", ".")])
    assert scores("here_only:half") == [{"half": 0.5}] * 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(4)", "raised SystemExit: 4"),
        ("open('no such file')", "raised FileNotFoundError: "),
        ("raise ValueError('a\\nb')", "raised ValueError: a$"),
    ],
)
def test_what_a_file_does_wrong_is_not_taken_for_a_file_that_is_missing(tmp_path, code, words):
    (tmp_path / "wrong.py").write_text(code)
    with pytest.raises(KepoConfigError, match=f"importing {tmp_path}/wrong.py {words}"):
        scores(f"{tmp_path}/wrong.py:f")


def test_each_completion_has_the_form_of_its_own_record():
    def forms(prompts, completions, **columns):
        kinds = zip(prompts, completions, strict=True)
        return [10 * isinstance(one, list) + isinstance(two, list) for one, two in kinds]

    chat = example("a", columns={"messages": [{"role": "user", "content": "?"}]})
    env = Environment(TASK, {"forms": forms})
    for asked, said in (([chat, EXAMPLES[1]], [11.0, 0.0]), ([EXAMPLES[1], chat], [0.0, 11.0])):
        assert [one["forms"] for one in env.scores(asked, TEXTS, IDS)] == said
