"""Steps of a completion and what their drift makes of the divergence's weights."""

import pytest
import torch
from toy import EOS, ScriptedVLM

from kepo.digits.tiny import build_tokenizer
from kepo.objective.sod import drift_weights, step_numbers

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


# ---- tags of several tokens ----

# As Qwen's tokenizer cuts a text before it merges: one sign may go with the letters after it, and
# other signs stay together.
CUTS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
MERGES = (
    "> \u010a | \u010a \u010a | < / | . </ | > < | > B | > </ | a n | s w | e r | an sw | "
    "answ er | t h | i n | th in | thin k"  # \u010a is how ByteLevel writes a line break
)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE in which no tag is one token, and signs beside a tag merge with it."""
    tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    before, after = tokenizers.pre_tokenizers, tokenizers.decoders
    merges = [tuple(pair.split()) for pair in MERGES.split(" | ")]
    tokens = [*sorted(before.ByteLevel.alphabet()), *map("".join, merges)]
    model = tokenizers.models.BPE({token: place for place, token in enumerate(tokens)}, merges)
    made = tokenizers.Tokenizer(model)
    split = before.Split(tokenizers.Regex(CUTS), "isolated")
    made.pre_tokenizer = before.Sequence(
        [split, before.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = after.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def parts(tokenizer, ids):
    """The tokens of each step."""
    steps = step_numbers(tokenizer, torch.tensor([ids]))[0].tolist()
    assert steps == sorted(steps) and set(steps) == set(range(steps[-1] + 1))
    return [[t for t, k in zip(ids, steps, strict=True) if k == step] for step in set(steps)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (  # three tokens each, with a period before, the next tag's sign and the letter behind
            "<think>so.</think><answer>B</answer>",
            ["< think > s o .</ think ><", "answer >B </ answer >"],
        ),
        ("a</think>b</answer>c", ["a </ think >", "b </ answer >", "c"]),
        ("a</think></answer>", ["a </ think ></", "answer >"]),
        ("</think>Bs", ["</ think >B", "s"]),  # the letter comes with the end of the tag
        ("x</answer", ["x </ answer"]),  # no end
        ("s > t </ s", ["s ␣ > ␣ t ␣ </ ␣ s"]),  # no tag
        ("a.</think>\nb", ["a .</ think >\n", "b"]),
        ("a\n\nb</s>", ["a \n\n", "b </ s >"]),
    ],
)
def test_a_tag_of_several_tokens_closes_its_step_where_it_ends(byte_level, text, expected):
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    found = [[byte_level.decode([token]) for token in part] for part in parts(byte_level, ids)]
    shown = [" ".join(token.replace(" ", "␣") for token in part) for part in found]
    assert shown == expected


def test_tokens_that_are_part_of_a_character_hide_no_tag(byte_level):
    text = "é日</think>日本</answer>😀"
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.replace("think", "t").replace("answer", "a"))
    found = [byte_level.decode(part) for part in parts(byte_level, ids)]
    assert found == ["é日</think>", "日本</answer>", "😀"]


def test_steps_are_those_of_whole_tags_whatever_the_tokens(byte_level):
    """Tags as single tokens and as several end the same steps of the text."""
    whole = build_tokenizer()
    for text in (
        "<think>3 + 5\n= 8</think><answer>C</answer>",
        "a\n<think>4</think><answer>B</answer>",
    ):
        texts = [
            [tokenizer.decode(part) for part in parts(tokenizer, ids)]
            for tokenizer in (whole, byte_level)
            for ids in [tokenizer(text, add_special_tokens=False)["input_ids"]]
        ]
        assert "".join(texts[0]) == "".join(texts[1]) == text and len(texts[0]) == len(texts[1]) > 2
        for one, other in zip(*texts, strict=True):  # a sign of the next tag goes with this one
            assert one.strip("<") == other.strip("<")


def test_finding_steps_is_linear_in_the_completion(byte_level):
    ids = byte_level("</" * 20_000, add_special_tokens=False)["input_ids"]
    assert step_numbers(byte_level, torch.tensor([ids])).max() == 0
