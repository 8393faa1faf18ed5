"""Answers, formats and hints in Qwen's real vocabulary: its tokens are parts of tags and words, or
tag and answer at once, and it composes the characters of every text."""

import unicodedata

import hint_texts
import hint_texts_newcomer
import pytest
from toy import TASK, example

pytest.importorskip("transformers")

import qwen_vocabulary

from kepo.config import Config
from kepo.rollout import hints
from kepo.rollout.rollouts import demonstrations
from kepo.sections import HintConfig
from kepo.tasks.environment import environment_of
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.open_answer import OpenAnswer
from kepo.tasks.task import Task


@pytest.fixture
def encoder(qwen):
    return qwen_vocabulary.encoder_of(qwen)


def said(encoder, *texts):
    """What texts are once they were tokens."""
    return encoder.decode(*encoder.encode_completions(texts))


# ---- answers ----

IN_TAGS = (
    "B",
    "b",
    "B.",
    "B)",
    "(B)",
    "\nB\n",
    " B ",
    "**B**",
    "$B$",
    "\\boxed{B}",
    "B. no",
    "`B`",
)


@pytest.mark.parametrize("answer", IN_TAGS)
def test_an_answer_is_found_whatever_its_letter_shares_a_token_with(encoder, answer):
    asked = example("q", answer="B")
    whole = [f"<think>so.</think>{gap}<answer>{answer}</answer>" for gap in ("", "\n", "\n\n")]
    for text in (*said(encoder, *whole), *said(encoder, f"It is clear.<answer>{answer}</answer>")):
        assert TASK.is_right(text, asked) and not TASK.is_right(text, example("q", answer="A"))
        assert TASK.is_formatted(text) == text.startswith("<think>")


def test_no_token_is_a_tag_and_few_are_a_letter(qwen2_5):
    """What the tests here are about: else the vocabulary has none of it."""
    found = [token for answer in IN_TAGS for token in qwen_vocabulary.tokens_of(
        qwen2_5, f"<think>so.</think><answer>{answer}</answer>")]  # fmt: skip
    assert not {"<think>", "</think>", "<answer>", "</answer>"} & set(found)
    assert {">B", ".</", ")</", "><", ">\n", ">("} <= set(found)


@pytest.mark.parametrize(
    "text",
    [
        "<think>so.</think><answer>B",
        "<think>so.</think><answer>B</answer",
        "<think>so.<answer>B</answer>",
        "<think>so.</think><answer>A</answer><answer>B</answer>",
        "<think>so.</think><answer>B</answer>.",
        "<think>so.</think><answer>A or B</answer>",
        "<think>so.</think><ANSWER>B</ANSWER>",
    ],
)
def test_what_is_malformed_stays_so(encoder, text):
    (text,) = said(encoder, text)
    assert not TASK.is_right(text, example("q", answer="B")) and not TASK.is_formatted(text)


def test_worked_answers_earn_what_they_are_worth_however_they_are_cut(encoder):
    asked = example("q", rationale="Ränder, 日本: the angles are sharp 👩‍⚕️.", answer="B")
    whole = TASK.worked_answer(asked)
    count = len(encoder.encode_completions([whole])[0][0])
    assert count > 20
    for limit in range(1, count + 2):
        config = Config(teacher="t", max_completion_length=limit)
        (given,) = demonstrations(encoder, [asked], environment_of(config), config)
        assert given.truncated == (limit < count) and len(given.completion_ids) == min(limit, count)
        assert whole.startswith(given.text.rstrip("\ufffd"))  # of a character cut in two
        good = float(limit >= count - 1)  # the end token is no text
        assert given.rewards == {"accuracy": good, "format": good}


# ---- composed and decomposed characters ----

DECOMPOSED = unicodedata.normalize("NFD", "Sjögren's syndrome")


@pytest.mark.parametrize("task", [Task(), MultipleChoice(), OpenAnswer()], ids=type)
def test_an_answer_is_right_though_the_data_write_its_accents_apart(encoder, task):
    asked = example("q", options=("cyst", DECOMPOSED), answer="B")
    if not isinstance(task, MultipleChoice):
        asked = example("q", options=(), answer=DECOMPOSED)
    told = f"<answer>{f'B. {DECOMPOSED}' if asked.options else DECOMPOSED}</answer>"
    (text,) = said(encoder, told)
    assert text != told and task.is_right(text, asked)
    (hint,) = said(encoder, f"It is {DECOMPOSED}.")
    assert task.gives_away(hint, asked)


def test_signs_are_the_same_with_their_strokes_apart(encoder):
    """≠ is one sign, or an equals sign with a stroke."""
    task, apart = OpenAnswer(), unicodedata.normalize("NFD", "≠")
    asked = example("q", options=(), answer=apart)
    (text, hint) = said(encoder, f"<answer>{apart}</answer>", f"It is {apart}.")
    assert task.is_right(text, asked) and task.gives_away(hint, asked)
    chosen = example("q", options=("=", apart), answer="B")
    assert TASK.gives_away(hint, chosen)


# ---- hints ----


def test_a_hint_is_found_in_its_tokens(encoder):
    texts = ("<hint>Look left.</hint>", "Well:<hint>\n3 + 5\n</hint>\n", "<hint>日本 é</hint>.")
    assert [TASK.hint_of(text) for text in said(encoder, *texts)] == [
        "Look left.",
        "3 + 5",
        "日本 é",
    ]
    odd = ("<hint>Look left", "<hint>a</hint><hint>b</hint>", "<hint> \n</hint>", "<Hint>a</Hint>")
    assert {TASK.hint_of(text) for text in said(encoder, *odd)} == {None}


def test_the_filter_judges_hints_that_were_tokens_as_they_were_written(encoder):
    labelled = [(hint_texts.QUESTIONS[name], hint) for name, hint in hint_texts.LEAKS]
    labelled += [
        (hint_texts_newcomer.QUESTIONS[name], hint) for name, hint in hint_texts_newcomer.FAIR
    ]
    texts = said(encoder, *(hint for _, hint in labelled))
    assert len(texts) > 290
    for (asked, hint), text in zip(labelled, texts, strict=True):
        assert TASK.gives_away(text, asked) == TASK.gives_away(hint, asked), hint


def test_a_hint_with_control_tokens_is_not_shown_however_they_were_written(encoder):
    def usable(hint):
        return hints.usable(hint, example("q"), TASK, HintConfig(), encoder)

    assert usable("Look left. <|x|> <| im_end |> <tool_call> </think> im_end")
    marked = [encoder.tokenizer.convert_ids_to_tokens(token) for token in encoder.control_ids]
    assert len(marked) == 20 and not any(usable(f"Look{token}left.") for token in marked)
    spelled = encoder.tokenizer.convert_tokens_to_ids(["<", "|", "im", "_end", "|", ">"])
    assert not encoder.control_ids & {*spelled}
    assert not usable(encoder.tokenizer.decode(spelled))
