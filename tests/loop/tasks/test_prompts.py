"""Prompt texts: complete, safe for any question, and hints parsed strictly."""

from pathlib import Path

import pytest
from toy import hint_request, hinted_prompt, question_prompt, worked_answer

from kepo.data.load import Example
from kepo.tasks.blocks import hint_in

BRACES = Example(
    id="q",
    question="Is {x} in {0} or {}?",
    options=("{yes}", "%s no"),
    answer="B",
    images=(Path("/x.png"),),
    modality="CT",
    question_type="Diagnosis",
    rationale="secret reasoning",
)


def test_question_prompt_shows_question_options_and_format():
    lines = question_prompt(BRACES).split("\n")
    assert lines[:3] == ["Is {x} in {0} or {}?", "A. {yes}", "B. %s no"]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert lines[3].count(tag) == 1
    assert len(lines) == 4


def test_question_prompt_does_not_give_the_answer_away():
    other = Example(**{**vars(BRACES), "answer": "A", "rationale": "another"})
    assert question_prompt(BRACES) == question_prompt(other)
    assert hint_request(BRACES, False) == hint_request(other, False)
    assert hinted_prompt(BRACES, "h") == hinted_prompt(other, "h")


def test_hint_request_tells_the_letter_only_if_asked():
    told, untold = hint_request(BRACES, True), hint_request(BRACES, False)
    assert "The answer is B." in told and "answer is" not in untold
    assert told.replace("The answer is B. ", "") == untold
    assert "<hint>" in untold and "<answer>" not in untold


def test_hinted_prompt_is_the_question_prompt_with_one_line_more():
    plain, hinted = question_prompt(BRACES).split("\n"), hinted_prompt(BRACES, "{h}").split("\n")
    assert "Hint: {h}" in hinted
    assert [line for line in hinted if line != "Hint: {h}"] == plain


def test_hinted_prompt_gives_the_letter_only_if_asked():
    told = hinted_prompt(BRACES, "h", gives_answer=True)
    assert told == hinted_prompt(BRACES, "h") + "\nThe answer is B."


def test_worked_answer_has_reasoning_where_the_dataset_has():
    assert worked_answer(BRACES) == "<think>secret reasoning</think><answer>B</answer>"
    assert worked_answer(Example(**{**vars(BRACES), "rationale": ""})) == "<answer>B</answer>"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("<hint>3 + 5</hint>", "3 + 5"),
        ("Well: <hint> look\nleft </hint> ok", "look\nleft"),
        ("<hint>{0} %s</hint>", "{0} %s"),
        ("no hint", None),
        ("<hint>open", None),
        ("closed</hint>", None),
        ("</hint>turned<hint>", None),
        ("<hint>a</hint><hint>b</hint>", None),
        ("<hint><hint>a</hint>", None),
        ("<hint>a</hint></hint>", None),
        ("<hint> \n </hint>", None),
        ("<hint>\u200b\ufe0f</hint>", None),
        ("", None),
    ],
)
def test_the_hint_in_a_text(text, hint):
    assert hint_in(text) == hint
