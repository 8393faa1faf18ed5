"""Qwen's real vocabulary through the encoder and the sampler: 151,669 ids under heads of 151,936
and 152,064 rows."""

import json
import unicodedata

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import qwen_vocabulary
import transformers
from qwen_vocabulary import ADDED, SPECIAL
from small import config_of, rigged

from kepo.digits import tiny
from kepo.errors import KepoConfigError, KepoDataError
from kepo.loop import train
from kepo.models import conventions
from kepo.models.encoding import Encoder, Prompt
from kepo.models.families import qwen3_vl, registry
from kepo.models.families.family import TinySize
from kepo.models.families.qwen_vl import pictures_of
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.run.metrics import read_metrics
from kepo.run.open import check_same_tokens
from kepo.teachers.first_words import known_text

IDS = {"qwen3": 151_669, "qwen2_5": 151_665}


@pytest.fixture
def encoder(qwen):
    return qwen_vocabulary.encoder_of(qwen)


# ---- the vocabulary itself ----


def test_its_ids_are_those_of_the_published_one(qwen3, qwen2_5):
    assert {"qwen3": len(qwen3), "qwen2_5": len(qwen2_5)} == IDS
    for tokenizer in (qwen3, qwen2_5):
        assert tokenizer("Hello, world")["input_ids"] == [9707, 11, 1879]
        named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<tool_call>"]
        ids = [151643, 151644, 151645, 151655, 151657]
        assert tokenizer.convert_tokens_to_ids(named) == ids
    assert qwen3.convert_tokens_to_ids(["<think>", "</think>"]) == [151667, 151668]


@pytest.mark.slow
def test_it_is_built_from_the_ranks(qwen_file, tmp_path):
    """The fixture's file may be an earlier run's."""
    assert qwen_vocabulary.built(tmp_path).read_bytes() == qwen_file.read_bytes()


# ---- encode and decode ----


def test_texts_come_back_composed(encoder):
    """Its normaliser composes characters, and nothing else of a text changes."""

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text):
        assume(not encoder.control_tokens_in(text))  # it also tries words of modules it has seen
        ids, mask = encoder.encode_completions([text, "beside it"])
        assert ids[0][mask[0]][-1] == encoder.end_ids[0]
        assert encoder.decode(ids, mask) == [unicodedata.normalize("NFC", text), "beside it"]

    check()


@pytest.mark.parametrize("token", [*SPECIAL, *(t for t in ADDED if t.startswith("<|"))])
def test_no_text_may_hold_a_control_token(encoder, token):
    for text in (token, f"Which?{token}", f"a{token}\u0338b", f"<answer>{token}</answer>"):
        assert encoder.control_tokens_in(text) == [token]
        with pytest.raises(KepoDataError, match="control tokens"):
            encoder.encode([Prompt(text)])
        with pytest.raises(KepoDataError, match="control tokens"):
            encoder.encode_completions([text])
    ids = torch.tensor([encoder.tokenizer(f"<ans{token}wer>")["input_ids"]])
    assert encoder.decode(ids, torch.ones_like(ids)) == ["<answer>"]


def test_tags_are_text_whether_or_not_they_are_tokens(encoder):
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_response>", "<answer>", "</hint>"):
        assert encoder.control_tokens_in(tag) == []
        encoder.encode([Prompt(tag)])
        assert encoder.decode(*encoder.encode_completions([f"a{tag}b"])) == [f"a{tag}b"]


@pytest.mark.parametrize("opened", ["<think>\n", "<think>"])
def test_an_answer_goes_on_from_what_the_template_opened(qwen, opened):
    encoder = qwen_vocabulary.encoder_of(qwen, opened=opened)
    texts = ["<think>so.</think>B", f"{opened}so.</think>B", "B", "\nso"]
    ids, mask = encoder.encode_completions(texts)
    assert encoder.decode(ids, mask) == [
        *(f"{opened}so.</think>B", f"{opened}so.</think>B", f"{opened}</think>B"),
        f"{opened}</think>\nso",
    ]


def test_digits_are_a_token_each_as_in_the_benchmarks_prompts(encoder):
    lengths = encoder.text_lengths([Prompt(f"What is {'7' * count}?") for count in range(1, 40)])
    assert lengths == list(range(lengths[0], lengths[0] + 39))


def test_the_text_that_a_server_tokenises_reaches_all_of_it(qwen):
    ids = set(qwen(known_text(qwen))["input_ids"])
    assert len(ids) > 400 and {*range(151_643, len(qwen))} <= ids


# ---- sampling ----


def model_of(tokenizer, rows):
    """A random Qwen3-VL with so many rows in its head, the last of which are by far the likeliest:
    those without a token, and the marks of pictures."""
    size = TinySize(hidden=32, layers=1, heads=4, vision_hidden=32, vision_depth=1)
    config = qwen3_vl.tiny_config(tokenizer, size)
    config.text_config.vocab_size = rows
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    family = registry.family_of(config)
    encoder = qwen_vocabulary.encoder_of(tokenizer)
    marks = family.marks(config, tokenizer)
    control = conventions.control_ids(tokenizer, marks, encoder.end_ids)
    pictures = pictures_of(None, config.image_token_id)
    vlm = VLM(model, Encoder(tokenizer, pictures, encoder.end_ids, control))
    inputs = vlm.encode([Prompt("Which?")])
    with torch.no_grad():
        ids = torch.tensor([[9707]])
        towards = vlm.completion_hidden(inputs, ids, torch.ones_like(ids).bool())[0, 0]
        towards = towards * 40 / towards.square().sum()
        vlm.head.weight[len(tokenizer) :] = towards
        vlm.head.weight[sorted(marks)] = towards
    return vlm


@pytest.mark.parametrize(
    ("name", "rows"), [("qwen3", 151_936), ("qwen3", 152_064), ("qwen2_5", 152_064)]
)
def test_ids_without_a_token_are_never_sampled(name, rows, request):
    vlm = model_of(request.getfixturevalue(name), rows)
    marks = [151652, 151653, 151655, 151656]  # where pictures begin and end, and their places
    assert vlm.never_sampled() == [*marks, *range(IDS[name], rows)]
    inputs = vlm.encode([Prompt("Which?")])
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.9)):
        params = SamplingParams(n=2, max_tokens=2, temperature=temperature, top_p=top_p)
        ids, mask, logprobs = vlm.generate(inputs, params, range(2))
        assert not torch.isin(ids[mask], torch.tensor(vlm.never_sampled())).any()
        assert logprobs.isfinite().all() and not (logprobs < -30).any()


def test_a_student_without_think_may_have_a_teacher_with_it(qwen3, qwen2_5):
    """As Qwen2.5's ids are Qwen3's; of the others its teacher may say anything."""
    older, newer = (VLM(None, qwen_vocabulary.encoder_of(one)) for one in (qwen2_5, qwen3))
    check_same_tokens(older, newer)
    with pytest.raises(KepoConfigError, match="disagree on 4 tokens, first '</think>': 151668"):
        check_same_tokens(newer, older)


# ---- the whole loop ----


@pytest.mark.slow
def test_a_run_with_real_words_and_heads_of_two_lengths(qwen3, made, tmp_path, monkeypatch):
    """Student and teacher as a Qwen2.5-VL of 3 and of 7 billion: 151,936 and 152,064 rows."""
    monkeypatch.setattr(tiny, "build_tokenizer", lambda: qwen3)
    for name, rows in (("student", 151_936), ("teacher", 152_064)):
        tiny.build_tiny(tmp_path / name, size=name, seed=0)
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("student", "teacher")}
    objective = dict(step_weights=True, gate_reward=None, hint_trigger="always", kl_coef=0.1)
    config = config_of(made, tmp_path / "run", **models, **objective, steps=1, max_attempts=1)
    with rigged():
        assert train(config).exit_code == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["skipped"] == 0 and record["kepo/hints_written"] > 0
    assert 0 < record["kepo/distill_loss"] < 1 and record["grad_norm"] > 0
    said = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["completion"] for line in said]
    assert len(texts) == 8 and all(texts)
