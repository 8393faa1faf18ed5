"""The parser against bad faith, and what the reward functions may return."""

import pytest

from kepo import rewards
from kepo.errors import KepoRewardError
from kepo.rewards import accuracy, format, parse_answer, score

GOOD = "<think>3 + 5 = 8</think><answer>C</answer>"

RIGHT = [
    GOOD,
    "<think>3 + 5 = 8</think>\n<answer> c. </answer>\n",
    "<answer>C</answer>",
    "So:<think>a\nb</think><answer>\nC\n</answer>",
    "so</think>\n\n<answer>C</answer>",  # all that is sampled where the prompt opened <think>
]
WRONG = {
    "no tag": "C",
    "sentence": "The answer is C",
    "other letter": GOOD.replace("C", "B"),
    "two blocks, right last": "<answer>B</answer><answer>C</answer>",
    "two blocks, right first": "<answer>C</answer><answer>B</answer>",
    "the same block twice": "<answer>C</answer><answer>C</answer>",
    "inside the reasoning": "<think>maybe <answer>C</answer></think>",
    "inside, another after": "<think><answer>C</answer></think><answer>B</answer>",
    "reasoning never closed": "<think>so <answer>C</answer>",
    "reasoning closed twice, not opened": "so</think></think><answer>C</answer>",
    "text between, not opened": "so</think> or <answer>C</answer>",
    "reasoning after": "<answer>C</answer><think>x</think>",
    "two reasonings": "<think>x</think><think>y</think><answer>C</answer>",
    "text between": "<think>x</think> or <answer>C</answer>",
    "text after": "<answer>C</answer> or B",
    "two letters": "<answer>C D</answer>",
    "all letters": "<answer>ABCD</answer>",
    "letter and text": "<answer>C) CT</answer>",
    "full-width letter": "<answer>\uff23</answer>",
    "digit": "<answer>3</answer>",
    "empty": "<answer></answer>",
    "unclosed": "<think>x</think><answer>C",
    "nested": "<answer><answer>C</answer>",
    "nested twice": "<answer><answer>C</answer></answer>",
    "wrong order": "</answer>C<answer>",
    "nothing": "",
}


@pytest.mark.parametrize("text", RIGHT)
def test_accuracy_accepts_the_one_answer(text):
    assert accuracy(text, "C") == 1.0
    assert accuracy(text, "B") == 0.0


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_accuracy_cannot_be_fooled(text):
    assert accuracy(text, "C") == 0.0


def test_a_wrong_letter_is_parsed_as_that_letter():
    assert parse_answer(WRONG["other letter"]) == "B"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        (GOOD + "\n", 1.0),
        (GOOD.replace("C", "D"), 1.0),  # format does not know what is right
        ("<answer>C</answer>", 0.0),
        ("so</think><answer>C</answer>", 0.0),
        ("Well. " + GOOD, 0.0),
        (GOOD + GOOD, 0.0),
        (GOOD.replace("C", "C D"), 0.0),
        (GOOD + " done", 0.0),
    ],
)
def test_format_wants_exactly_the_two_blocks(text, expected):
    assert format(text, "C") == expected


def test_parsing_is_linear_in_the_text():
    hostile = "<think>" * 50_000 + "<answer>" * 50_000
    assert parse_answer(hostile) is None


def test_score_calls_each_reward_by_name():
    assert score(("accuracy", "format"), GOOD, "C", "q1") == {"accuracy": 1.0, "format": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_score_refuses_what_is_not_a_finite_number(monkeypatch, value):
    monkeypatch.setitem(rewards.REWARDS, "odd", lambda text, answer: value)
    with pytest.raises(KepoRewardError, match=r"'odd' returned .* example 'q7'"):
        score(("odd",), GOOD, "C", "q7")


def test_score_names_the_reward_that_raised(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "broken", lambda text, answer: 1 / 0)
    with pytest.raises(KepoRewardError, match=r"'broken' raised ZeroDivisionError .* 'q7'"):
        score(("broken",), GOOD, "C", "q7")
