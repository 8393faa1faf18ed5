"""Steps of a completion and what their drift makes of the divergence's weights."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import EOS, ScriptedVLM

from kepo.digits.tiny import build_tokenizer
from kepo.objective import sod
from kepo.objective.sod import drift_weights, step_numbers

TOKENIZER = ScriptedVLM(lambda prompt, nth: "").tokenizer  # one token per character


def numbers(text):
    return "".join(map(str, step_numbers(TOKENIZER, torch.tensor([[*text.encode()]]))[0].tolist()))


def test_a_step_ends_with_its_line():
    assert numbers("ab\ncd\n\ne") == "00011122"  # a blank line is none of its own
    assert numbers("abc") == "000" and numbers("\na\nb") == "0001"


def test_a_step_ends_where_a_tag_closes():
    tokenizer = build_tokenizer()
    ids = tokenizer("<think>3 + 5\n= 8</think><answer>C</answer>", add_special_tokens=False)
    ids = torch.tensor([[*ids["input_ids"], tokenizer.eos_token_id]])
    steps = step_numbers(tokenizer, ids)
    assert steps.dtype == torch.int64 and steps.shape == ids.shape
    parts = [tokenizer.decode(ids[0][steps[0] == k]) for k in range(4)]
    assert parts == ["<think>3 + 5\n", "= 8</think>", "<answer>C</answer>", "<|im_end|>"]


def test_rows_are_numbered_by_themselves():
    ids = torch.tensor([[*b"a\nb"], [*b"abc"]])
    assert step_numbers(TOKENIZER, ids).tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_weights_fall_as_the_models_drift_apart(gap):
    # Steps "a\n", "b\n", "cd": mean |difference| 0.2, 0.4, 0.1 against the first's 0.2.
    ids = torch.tensor([[*b"a\nb\ncd", EOS]])
    mask = torch.tensor([[True] * 6 + [False]])
    logprobs = torch.full((1, 7), -1.0)
    differences = torch.tensor([[0.1, -0.3, 0.4, 0.4, -0.1 - gap, 0.1 + gap, 9.0]])
    weights = drift_weights(TOKENIZER, ids, logprobs, logprobs + differences, mask)
    # min(d_1 / d_k, 1.2): half as much where the drift has doubled, never more than 1.2
    last = 1.2 if gap == 0.0 else 1.0
    expected = torch.tensor([[1.0, 1.0, 0.5, 0.5, last, last, 0.0]]).double()
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=0.0)


# ---- tags of several tokens, as Qwen's vocabulary has them ----


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def parts(tokenizer, ids):
    """The tokens of each step."""
    steps = step_numbers(tokenizer, torch.tensor([ids]))[0].tolist()
    assert steps == sorted(steps) and set(steps) == set(range(steps[-1] + 1))
    return [[t for t, k in zip(ids, steps, strict=True) if k == step] for step in set(steps)]


def shown(tokenizer, ids):
    found = [[tokenizer.decode([token]) for token in part] for part in parts(tokenizer, ids)]
    return [" ".join(token.replace(" ", "␣") for token in part) for part in found]


SAID = "<think>so.</think><answer>B</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (  # three tokens each, with a period before, the next tag's sign and the letter behind
            SAID,
            ["<th ink > so .</ think ><", "answer >B </ answer >"],
        ),
        ("a</think>b</answer>c", ["a </ think >b", "</ answer >c"]),
        ("a</think></answer>", ["a </ think ></", "answer >"]),
        ("a</think>B</s>c", ["a </ think >B", "</ s >c"]),  # the letter comes with the tag's end
        ("<think>\n\na\n</think>\nB", ["<th ink >\n\n a \n", "</ think >\n B"]),
        ("x</answer", ["x </ answer"]),  # no end
        ("s > t </ s", ["s ␣> ␣t ␣</ ␣s"]),  # no tag
        ("a.</think>\nb", ["a .</ think >\n", "b"]),
        ("a\n\nb</s>", ["a \n\n", "b </ s >"]),
    ],
)
def test_a_tag_of_several_tokens_closes_its_step_where_it_ends(qwen2_5, text, expected):
    assert shown(qwen2_5, ids_of(qwen2_5, text)) == expected


def test_a_tag_may_be_one_token_and_the_next_several(qwen3):
    expected = ["<think> so . </think>", "< answer >B </ answer >"]
    assert shown(qwen3, ids_of(qwen3, SAID)) == expected


def test_steps_are_those_of_whole_tags_whatever_the_tokens(qwen):
    """Tags as single tokens and as several end the same steps of the text."""
    whole = build_tokenizer()
    for text in (
        "<think>3 + 5\n= 8</think><answer>C</answer>",
        "a\n<think>4</think><answer>B</answer>",
    ):
        texts = [
            [tokenizer.decode(part) for part in parts(tokenizer, ids_of(tokenizer, text))]
            for tokenizer in (whole, qwen)
        ]
        assert "".join(texts[0]) == "".join(texts[1]) == text and len(texts[0]) == len(texts[1]) > 2
        for one, other in zip(*texts, strict=True):  # a sign of the next tag goes with this one
            assert one.strip("<") == other.strip("<")


PIECES = ["</think>", "</answer>", "<answer>", "</s>", "</", "<", ">", "think", " ", "\n", "\r\n"]
PIECES += ["B", ".", "é", "日", "👩", "</a b>", "<|im_end|>", "\ufffd"]


def test_steps_end_where_the_whole_text_says(qwen):
    """By the tokenizer's own offsets: with the character that ends a closing tag or a line."""

    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=20).map("".join))
    def check(text):
        cut = qwen(text, add_special_tokens=False, return_offsets_mapping=True)
        tags = [tag.span() for tag in re.finditer(r"</?[^<>\s]*>", text)]
        last, said = set(), False
        for place, character in enumerate(text):
            tag = next((tag for tag in tags if tag[0] <= place < tag[1]), None)
            said = said or not (tag or character.isspace())
            closes = tag is not None and text[tag[0] + 1] == "/" and place == tag[1] - 1
            if said and (closes or character == "\n"):
                last.add(place)
                said = False
        ends = [any(start <= place < end for place in last) for start, end in cut["offset_mapping"]]
        expected = [sum(ends[:place]) for place in range(len(ends))]
        assert step_numbers(qwen, torch.tensor([cut["input_ids"]]))[0].tolist() == expected

    check()


def test_finding_steps_is_linear_in_the_completion(qwen2_5):
    ids = ids_of(qwen2_5, "</" * 20_000)
    assert step_numbers(qwen2_5, torch.tensor([ids])).max() == 0


@pytest.mark.parametrize("text", ["<think>\nso.\n</think>\n\n<answer>B</answer>", "\nso\nB"])
def test_a_first_line_without_words_does_not_hide_all_others(qwen, text):
    """Both models are sure of a tag and of a line break: measured by those, every step would have
    drifted a thousand times as far, and none would be distilled on."""
    ids = ids_of(qwen, text)
    sure = [len(qwen.decode(ids[: place + 1])) <= text.index("so") for place in range(len(ids))]
    drift = torch.where(torch.tensor([sure]), 1e-4, 0.1)
    logprobs, mask = torch.full(drift.shape, -1.0), torch.ones(drift.shape, dtype=torch.bool)
    weights = drift_weights(qwen, torch.tensor([ids]), logprobs, logprobs + drift, mask)
    assert weights.min() > 0.4


# ---- a fault that was: a step closed where ONE token is a closing tag ----


def the_second_of_two_tags_is_weighed_by_its_own_drift(tokenizer):
    """Without a line break, too: where the models drift apart five times as far as in the first."""
    first = "<hint>so.</hint>"
    ids = ids_of(tokenizer, f"{first}<answer>B</answer>")
    starts = [len(tokenizer.decode(ids[:place])) for place in range(len(ids))]
    drift = torch.tensor([[0.1 if start < len(first) else 0.5 for start in starts]])
    logprobs, mask = torch.full(drift.shape, -1.0), torch.ones(drift.shape, dtype=torch.bool)
    weights = drift_weights(tokenizer, torch.tensor([ids]), logprobs, logprobs + drift, mask)
    assert weights[0, [0, -1]].tolist() == pytest.approx([1.0, 0.2], rel=1e-4)


def one_token_closes(texts):
    return [
        place
        for place, text in enumerate(texts)
        if "\n" in text or (text.startswith("</") and text.endswith(">"))
    ]


def test_steps_end_with_their_tags(qwen):
    the_second_of_two_tags_is_weighed_by_its_own_drift(qwen)


def test_real_words_find_steps_that_close_with_one_token(qwen, monkeypatch):
    """The digits' vocabulary, in which each tag is one token, does not find them."""
    monkeypatch.setattr(sod, "_last_tokens", one_token_closes)
    the_second_of_two_tags_is_weighed_by_its_own_drift(build_tokenizer())
    with pytest.raises(AssertionError):
        the_second_of_two_tags_is_weighed_by_its_own_drift(qwen)
