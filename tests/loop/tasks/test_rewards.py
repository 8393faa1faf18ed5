"""The parser against bad faith, and what the reward functions may return."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from toy import ENV, example, judged

from kepo.errors import KepoRewardError
from kepo.tasks.environment import Environment

GOOD = "<think>3 + 5 = 8</think><answer>C</answer>"
parse_answer = ENV.task.answer_of


def accuracy(text, answer):
    return judged(text, answer)["accuracy"]


def format(text, answer):
    return judged(text, answer)["format"]


def scored_by(name, value):
    """The rewards of a function that returns ``value`` for its one completion."""
    env = Environment(ENV.task, {name: lambda **columns: [value()]})
    return env.scores([example("q7")], [GOOD], [[1]])[0]


RIGHT = [
    GOOD,
    "<think>3 + 5 = 8</think>\n<answer> c. </answer>\n",
    "<answer>C</answer>",
    "So:<think>a\nb</think><answer>\nC\n</answer>",
    *(f"<answer>{form}</answer>" for form in ("(C)", "C)", "C:", " (c). ", "c)\n")),
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
    "half a bracket": "<answer>(C</answer>",
    "two brackets": "<answer>((C))</answer>",
    "two letters in brackets": "<answer>(C)(D)</answer>",
    "wide brackets": "<answer>\uff08C\uff09</answer>",
    "full-width letter": "<answer>\uff23</answer>",
    "Cyrillic letter": "<answer>\u0421</answer>",
    "Greek letter": "<answer>\u03f9</answer>",
    "letter with an accent": "<answer>\u0106</answer>",
    "letter in a circle": "<answer>\u24b8</answer>",
    "mathematical letter": "<answer>\U0001d402</answer>",
    "beside a zero-width space": "<answer>\u200bC</answer>",
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
        *(
            (f"<think>{thought}</think><answer>C</answer>", 0.0)
            for thought in (
                *("", " ", "\n \t", "\u00a0", "\u200b\u200b", "\ufeff", "\u2800", "\x00"),
                *("\ufe0f", "\u034f", "\u17b4\u17b5", "\ufffc", "\u0301\u0308", "\u20dd", "\ue000"),
                *(
                    "\U000e0041",
                    "\U000e0100",
                    "\u3164 \u115f",
                    "\U0001d159",
                    "\u180b\u180e",
                    "\u0903",
                ),
            )
        ),
        ("<think>e\u0301</think><answer>C</answer>", 1.0),
        ("<think>\u2764\ufe0f</think><answer>C</answer>", 1.0),
        ("<think>?</think><answer>C</answer>", 1.0),
    ],
)
def test_format_wants_exactly_the_two_blocks(text, expected):
    assert format(text, "C") == expected


@pytest.mark.parametrize("odd", ["\u0131", "\u017f", "\u212a", "\uff21", "\u0410", "\u0391"])
def test_only_a_to_z_is_a_letter(odd):
    """Some of them become one in capitals or small letters: dotless i, long s, the Kelvin sign."""
    block = f"<answer>{odd}</answer>"
    assert parse_answer(block) is None and format(f"<think>x</think>{block}", "A") == 0.0
    for right in {odd.upper(), odd.lower(), odd}:
        assert accuracy(block, right) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("answer", "an\u017fwer"),
        GOOD.replace("think", "thin\u212a"),
        GOOD.replace("think", "th\u0131nk"),
        GOOD.replace("<", "\uff1c"),
        GOOD.upper(),
    ],
)
def test_only_the_tags_themselves_are_tags(text):
    assert format(text, "C") == 0.0


def test_parsing_is_linear_in_the_text():
    hostile = "<think>" * 50_000 + "<answer>" * 50_000
    assert parse_answer(hostile) is None


def test_score_calls_each_reward_by_name():
    assert judged(GOOD, "C") == {"accuracy": 1.0, "format": 1.0}


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (Fraction(1, 2), 0.5),
        *((kind(0.5), 0.5) for kind in (np.float16, np.float32, np.float64, np.longdouble)),
        *((kind(3), 3.0) for kind in (np.int8, np.int64, np.uint8)),
        *((kind(True), 1.0) for kind in (np.bool_, np.array, torch.tensor)),
        *((kind(0.5), 0.5) for kind in (np.array, torch.tensor)),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_a_number_of_any_library_is_a_reward(value, number):
    found = scored_by("odd", lambda: value)
    assert found == {"odd": number} and type(found["odd"]) is float


@pytest.mark.parametrize(
    "value",
    [
        *(kind(bad) for kind in (float, np.float32, torch.tensor) for bad in (np.nan, -np.inf)),
        *("1", b"1", np.str_("1"), 1j, 10**400, {}, np.array(None), np.datetime64("2020")),
        *(
            [0.5],
            (0.5,),
            np.array([0.5]),
            torch.tensor([[0.5]]),
            np.zeros((9, 9)),
            torch.tensor([]),
        ),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:9]}",
)
def test_score_refuses_what_is_not_one_finite_number(value):
    with pytest.raises(KepoRewardError, match=r"^rewards: 'odd' returned .* 'q7'") as caught:
        scored_by("odd", lambda: value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_score_names_the_reward_that_raised():
    with pytest.raises(KepoRewardError, match=r"'broken' raised ZeroDivisionError .* 'q7'"):
        scored_by("broken", lambda: 1 / 0)
