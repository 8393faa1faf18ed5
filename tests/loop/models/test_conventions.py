"""Conventions that a model's files state: read and obeyed, or refused when it is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES
from folders import change_json, change_template, change_text_config, make_special
from small import config_of
from toy import ENV, judged

from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.loop import train
from kepo.models.encoding import Prompt
from kepo.models.sampling import Sampled, SamplingParams
from kepo.models.vlm import VLM
from kepo.objective.sod import step_numbers
from kepo.rollout.rollouts import demonstrations, sample

CPU = torch.device("cpu")
SAID = "<think>3 + 5 = 8</think><answer>C</answer>"
ASKS = "<|im_start|>assistant\n"


@pytest.fixture
def folder(tinies, tmp_path) -> Path:
    return Path(shutil.copytree(tinies / "qwen3", tmp_path / "model"))


def token(vlm: VLM, text: str) -> int:
    return vlm.tokenizer.convert_tokens_to_ids(text)


def rows(vlm: VLM, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of texts that a model could have sampled, without an end."""
    ids = [vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, ids))
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in ids])
    return torch.tensor([row + [0] * (length - len(row)) for row in ids]), mask


# ---- what the template has begun to say ----


@pytest.mark.parametrize("opens", ["<think>\n", "<think>", "Well.\n<think>\n\n"])
def test_an_answer_begins_where_the_template_opened_it(folder, opens):
    change_template(folder, ASKS, ASKS + opens)
    vlm = VLM.load(folder)
    opened = opens.removeprefix("Well.\n")
    assert vlm.encoder.opened == opened
    end = vlm.tokenizer.decode(vlm.encode([Prompt("?")]).input_ids[0])
    assert end.endswith(ASKS + opens)

    (text,) = vlm.decode(*rows(vlm, "3 + 5 = 8</think>\n\n<answer>C</answer>"))
    assert text == opened + "3 + 5 = 8</think>\n\n<answer>C</answer>"
    assert judged(text, "C") == {"accuracy": 1.0, "format": 1.0}
    (never_closed,) = vlm.decode(*rows(vlm, "so <answer>C</answer>"))
    assert judged(never_closed, "C")["accuracy"] == 0.0


def test_a_template_that_closes_what_it_opens_says_nothing_for_the_model(folder):
    change_template(folder, ASKS, ASKS + "<think>\n\n</think>\n\n")
    vlm = VLM.load(folder)
    assert vlm.encoder.opened == ""
    assert vlm.decode(*rows(vlm, SAID)) == [SAID]


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_that_open_nothing_change_nothing(tinies, name):
    vlm = VLM.load(tinies / name)
    assert vlm.encoder.opened == ""
    assert vlm.decode(*rows(vlm, SAID)) == [SAID]


def test_worked_answers_do_not_open_twice(folder, made):
    change_template(folder, ASKS, ASKS + "<think>\n")
    vlm = VLM.load(folder)
    texts = [SAID, "<think>\nso</think><answer>C</answer>", "<answer>C</answer>", "<hint>x</hint>"]
    ids, mask = vlm.encode_completions(texts)
    said = [vlm.tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]
    assert said == [
        "3 + 5 = 8</think><answer>C</answer><|im_end|>",
        "so</think><answer>C</answer><|im_end|>",
        "</think><answer>C</answer><|im_end|>",
        "</think><hint>x</hint><|im_end|>",
    ]
    decoded = vlm.decode(ids, mask)
    assert decoded[0] == "<think>\n3 + 5 = 8</think><answer>C</answer>"
    assert [judged(text, "C")["accuracy"] for text in decoded[:3]] == [1.0, 1.0, 1.0]

    from kepo.data.load import load_omnimedvqa

    example = load_omnimedvqa(made / "data" / "train")[0]
    config = config_of(made, made, max_completion_length=64)
    (given,) = demonstrations(vlm.encoder, [example], ENV, config)
    assert given.rewards["accuracy"] == given.rewards["format"] == 1.0 and not given.truncated
    assert token(vlm, "<think>") not in given.completion_ids


def test_a_run_whose_teacher_opens_otherwise_is_refused(folder, made, tmp_path):
    from kepo.digits.tiny import build_tiny

    build_tiny(tmp_path / "teacher", size="teacher", seed=0)
    change_template(folder, ASKS, ASKS + "<think>\n")
    config = config_of(
        made, tmp_path / "run", student=str(folder), teacher=str(tmp_path / "teacher"), steps=1
    )
    with pytest.raises(KepoConfigError, match=r"opens an answer with '<think>\\n' and the teach"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- special tokens ----


def test_format_tags_that_are_special_tokens_stay_in_the_text(folder):
    make_special(folder, "<think>", "</think>", "<answer>", "</answer>", "<hint>", "</hint>")
    vlm = VLM.load(folder)
    assert vlm.tokenizer.added_tokens_decoder[token(vlm, "<think>")].special
    ids, mask = vlm.encode_completions([SAID])
    assert vlm.decode(ids, mask) == [SAID]
    assert step_numbers(vlm.tokenizer, ids).max() > 0
    vlm.encode([Prompt(SAID)])  # and they are no control tokens


def test_control_tokens_are_never_text(tinies):
    vlm = VLM.load(tinies / "qwen3")
    around = "a<|im_start|>b<|endoftext|>c<|image_pad|>d<|vision_end|>e<|im_end|>"
    assert vlm.decode(*rows(vlm, around)) == ["abcde"]
    assert vlm.encoder.control_tokens_in(around) == [
        *("<|im_start|>", "<|endoftext|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>")
    ]
    assert vlm.encoder.control_tokens_in(f"{SAID} <b> im_end <|im_ end|>") == []


def test_a_token_with_a_role_is_no_tag_whatever_it_looks_like(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|endoftext|>", "<pad>")
        (folder / name).write_text(text)
    vlm = VLM.load(folder)
    assert vlm.decode(*rows(vlm, "a<pad>")) == ["a"]


# ---- how a completion ends ----


def test_every_end_token_ends_a_completion(folder, made, monkeypatch):
    from kepo.data.load import load_omnimedvqa

    vlm = VLM.load(folder)
    ends = [token(vlm, "<|im_end|>"), token(vlm, "<|endoftext|>")]
    assert list(vlm.encoder.end_ids) == ends
    assert not set(ends) & set(vlm.never_sampled())
    text = "<answer>A</answer>"
    body = rows(vlm, text)[0][0].tolist()
    ids = torch.tensor([body + [ends[0]], body + [ends[1]], body + [body[0]]])
    drawn = Sampled(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))
    monkeypatch.setattr(vlm, "sample", lambda *args, **settings: drawn)
    example = load_omnimedvqa(made / "data" / "train")[0]
    (group,) = sample(vlm, [example], ENV, config_of(made, made), num_generations=3)
    assert [rollout.truncated for rollout in group] == [False, False, True]
    assert [rollout.text for rollout in group[:2]] == [text, text]


@pytest.mark.parametrize("stated", ["<|im_end|>", "<|endoftext|>"])
def test_sampling_stops_at_the_end_that_only_generation_config_names(folder, stated):
    """Whichever the tokenizer calls its end; the law is bent so that both are drawn soon."""
    other = {"<|im_end|>": "<|endoftext|>", "<|endoftext|>": "<|im_end|>"}[stated]
    vlm = VLM.load(folder)
    change_json(folder / "tokenizer_config.json", eos_token=other)
    change_json(folder / "generation_config.json", eos_token_id=[token(vlm, stated)])
    vlm = VLM.load(folder)
    assert set(vlm.encoder.end_ids) == {token(vlm, stated), token(vlm, other)}
    inputs = vlm.encode([Prompt("Which?")])
    with torch.no_grad():
        ids, mask, _ = vlm.generate(
            inputs, SamplingParams(max_tokens=1, temperature=1.0), seeds=[0]
        )
        towards = vlm.completion_hidden(inputs, ids, mask)[0, 0]
        vlm.head.weight[token(vlm, stated)] = towards * 100 / towards.square().sum()
    ids, mask, _ = vlm.generate(inputs, SamplingParams(max_tokens=5, temperature=0.0))
    assert ids.tolist() == [[token(vlm, stated)]] and mask.all()


def test_a_worked_answer_ends_as_the_template_ends_it(folder):
    change_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    vlm = VLM.load(folder)
    assert vlm.tokenizer.eos_token == "<|endoftext|>"
    ids, _ = vlm.encode_completions(["a"])
    assert ids[0, -1] == token(vlm, "<|im_end|>") == vlm.encoder.end_ids[0]
    (folder / "generation_config.json").unlink()
    ends = [token(vlm, "<|im_end|>"), token(vlm, "<|endoftext|>")]
    assert list(VLM.load(folder).encoder.end_ids) == ends


def test_a_pad_that_is_the_end_is_both(folder):
    change_json(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    change_json(folder / "generation_config.json", eos_token_id=None)
    vlm = VLM.load(folder)
    end = token(vlm, "<|im_end|>")
    assert vlm.encoder.end_ids == (end,) and vlm.tokenizer.pad_token_id == end
    assert end not in vlm.never_sampled()
    ids, mask, _ = vlm.generate(
        vlm.encode([Prompt("a"), Prompt("Which one?")]),
        SamplingParams(max_tokens=40, temperature=3.0, n=16),
        seeds=range(32),
    )
    ended = (ids == end).any(-1)
    assert 0 < ended.sum() < 32
    for row, keep in zip(ids, mask, strict=True):
        length = int(keep.sum())
        assert (row[: length - 1] != end).all() and (row[length:] == end).all()


def test_without_generation_config_the_tokenizers_end_counts(folder):
    (folder / "generation_config.json").unlink()
    vlm = VLM.load(folder)
    assert vlm.encoder.end_ids == (token(vlm, "<|im_end|>"),)


ODD_IDS = ["2", 2.0, ["<|im_end|>"], "<|im_end|>", 300_000, 383, -1, True, [336, "334"], [[336]]]


@pytest.mark.parametrize("stated", ODD_IDS, ids=str)
def test_an_end_token_that_is_no_id_is_refused(folder, stated):
    """Passed over, no completion would end there. (383 has a row of the head, and no token.)"""
    change_json(folder / "generation_config.json", eos_token_id=stated)
    says = re.escape(f"generation_config.json says eos_token_id={stated!r}; expected the id of a")
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(folder)


@pytest.mark.parametrize("stated", [*ODD_IDS, None, []], ids=str)
def test_an_end_token_of_config_is_one_too(folder, stated):
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", eos_token_id=stated)
    if stated:
        says = re.escape(f"config.json says eos_token_id={stated!r}; expected the id of a token")
        with pytest.raises(KepoCheckpointError, match=says):
            VLM.load(folder)
    else:
        vlm = VLM.load(folder)
        assert vlm.encoder.end_ids == (token(vlm, "<|im_end|>"),)


def test_an_end_token_that_nobody_stated_is_not_judged(tinies, tmp_path):
    """The default of the class of Qwen2.5-VL is an id of the released tokenizer."""
    folder = Path(shutil.copytree(tinies / "qwen2.5", tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    vlm = VLM.load(folder)
    assert vlm.model.config.get_text_config().eos_token_id == 151645
    assert vlm.encoder.end_ids == (token(vlm, "<|im_end|>"),)


@pytest.mark.parametrize("pad", [-1, 384, "2", 2.0, True])
def test_a_padding_token_that_is_no_row_is_refused(folder, pad):
    """-1 would be the last row, whose gradient is then lost."""
    change_text_config(folder, pad_token_id=pad)
    with pytest.raises(KepoCheckpointError, match=r"pad_token_id"):
        VLM.load(folder)


def test_a_generation_config_that_is_no_json_is_refused(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(KepoCheckpointError, match=r"generation_config\.json cannot be read"):
        VLM.load(folder)
