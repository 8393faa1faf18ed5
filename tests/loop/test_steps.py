"""Steps of a completion and what their drift makes of the divergence's weights."""

import pytest
import torch
from toy import EOS, ScriptedVLM

from kepo.steps import drift_weights, step_numbers
from kepo.tiny import build_tokenizer

TOKENIZER = ScriptedVLM(lambda prompt, nth: "").tokenizer  # one token per character


def numbers(text):
    return "".join(map(str, step_numbers(TOKENIZER, torch.tensor([[*text.encode()]]))[0].tolist()))


def test_a_step_ends_with_its_line():
    assert numbers("ab\ncd\n\ne") == "00011123"
    assert numbers("abc") == "000" and numbers("\na") == "01"


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
