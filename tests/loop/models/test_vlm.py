"""Tiny Qwen-VL models through encode, generate, completion_hidden, save and load."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from families import FAMILIES, pictures

from kepo.digits.tiny import build_tiny, build_tokenizer
from kepo.errors import KepoCheckpointError, KepoConfigError, KepoDataError
from kepo.miniature.tiny_models import FORMAT_TAGS
from kepo.models import encoding
from kepo.models.encoding import Inputs, Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tinies) -> Path:
    return tinies / request.param


@pytest.fixture(scope="module")
def vlm(folder) -> VLM:
    return VLM.load(folder)


@pytest.fixture(scope="module")
def student(tinies) -> VLM:
    return VLM.load(tinies / "qwen3")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    sizes = [(64, 32), (32, 32), (96, 64)]  # so that prompts differ in image tokens too
    texts = ["Which?", "What is the sum of the two digits?", "Why {so}?\nA. 1\nB. 12"]
    shown = pictures(tmp_path_factory.mktemp("images"), *sizes)
    return [Prompt(text, path) for text, path in zip(texts, shown, strict=True)]


@pytest.fixture(scope="module")
def completion(vlm) -> tuple[torch.Tensor, torch.Tensor]:
    return vlm.encode_completions(["<think>3 + 5 = 8</think><answer>C</answer>", "no", "a b c"])


def same(a: Inputs, b: Inputs) -> bool:
    def equal(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Inputs))


# ---- tokenizer ----


def test_tokenizer_round_trips_and_splits_as_promised():
    tokenizer = build_tokenizer()
    for text in ("3 + 15 = 18", "naïve {x}\n\tß 漢 <b>", "<think>a</think>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    for tag in FORMAT_TAGS:
        assert len(tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1
    digits = tokenizer("2026", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits) == list("2026")


def test_build_tiny_is_deterministic_and_leaves_the_random_state(tinies, tmp_path):
    before = torch.get_rng_state()
    build_tiny(tmp_path / "a", size="student", seed=0)
    build_tiny(tmp_path / "b", size="student", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json"):
        again, first = (tmp_path / "a" / name).read_bytes(), tinies / "qwen3" / name
        assert again == first.read_bytes(), name
    a, b = (VLM.load(tmp_path / name).head.weight for name in "ab")
    assert not torch.equal(a, b)


def test_student_and_teacher_share_the_vocabulary_but_not_the_width(vlm, tmp_path):
    build_tiny(tmp_path, size="teacher", seed=0)
    teacher = VLM.load(tmp_path)
    assert teacher.tokenizer.get_vocab() == vlm.tokenizer.get_vocab()
    assert teacher.head.weight.shape[0] == vlm.head.weight.shape[0] >= len(vlm.tokenizer)
    assert teacher.head.weight.shape[1] != vlm.head.weight.shape[1]


# ---- encode ----


def test_encode_expands_images_and_pads_left(vlm, prompts):
    inputs = vlm.encode(prompts)
    image = vlm.model.config.image_token_id
    assert inputs.image_grid_thw.tolist() == [[1, 2, 4], [1, 2, 2], [1, 4, 6]]
    assert (inputs.input_ids == image).sum(1).tolist() == [2, 1, 6]
    assert torch.equal(inputs.mm_token_type_ids, (inputs.input_ids == image).long())
    assert inputs.pixel_values.shape[0] == 8 + 4 + 24
    lengths = inputs.attention_mask.sum(1)
    assert lengths.max() == inputs.input_ids.shape[1] and lengths.min() < lengths.max()
    for row, mask, length in zip(inputs.input_ids, inputs.attention_mask, lengths, strict=True):
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert (row[mask == 0] == vlm.tokenizer.pad_token_id).all()
        text = vlm.tokenizer.decode(row[mask == 1])
        assert text.startswith("<|im_start|>")
        assert "<|im_start|>user\n<|vision_start|><|image_pad|>" in text
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_lengths_are_those_of_encode_and_no_picture_is_decoded(vlm, tmp_path, monkeypatch):
    """All ranks ask for the lengths of a whole step, and each then decodes its own share."""
    sizes = [(64, 32), (32, 32), (300, 41), (41, 300), (640, 480)]
    shown = pictures(tmp_path, *sizes)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (300, 41)).save(turned, exif=exif)
    several = [Prompt("Which?", path) for path in (*shown, turned)]
    several += [Prompt("Which of them, or none?", (shown[0], shown[4], shown[0])), Prompt("None")]
    truth = vlm.encode(several).attention_mask.sum(-1).tolist()
    vlm.encoder._patches.clear()
    monkeypatch.setattr(encoding, "open_rgb", None)
    assert vlm.encoder.lengths([*several, several[0]]) == [*truth, truth[0]]


def test_lengths_of_what_is_no_picture_are_refused(vlm, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (2000, 2)).save(tmp_path / "thin.png")
    for name, says in (("broken", "broken.png: cannot identify"), ("thin", "refuses .*2000 x 2")):
        with pytest.raises(KepoDataError, match=says):
            vlm.encoder.lengths([Prompt("Which?", tmp_path / f"{name}.png")])


def test_encode_sees_a_file_that_changed(vlm, prompts, tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (32, 32), (0, 0, 0)).save(path)
    dark = vlm.encode([Prompt("?", path)]).pixel_values
    Image.new("RGB", (64, 32), (255, 255, 255)).save(path)
    bright = vlm.encode([Prompt("?", path)]).pixel_values
    assert dark.shape[0] == 4 and bright.shape[0] == 8
    assert dark.max() < -1 + 1e-6 and bright.min() > 1 - 1e-6


def test_encode_refuses_what_it_cannot_place(vlm, prompts, tmp_path):
    with pytest.raises(KepoDataError, match="prompts is empty"):
        vlm.encode([])
    with pytest.raises(KepoDataError, match=r"has the control tokens \['<\|image_pad\|>'\]"):
        vlm.encode([Prompt("look <|image_pad|>", prompts[0].images)])
    with pytest.raises(KepoDataError, match=r"completion 'a <\|im_end\|>' has the control tokens"):
        vlm.encode_completions(["a", "a <|im_end|>"])
    with pytest.raises(KepoDataError, match="half a character"):
        vlm.encode([Prompt("a \ud800 b")])
    with pytest.raises(KepoDataError, match=r"gone\.png"):
        vlm.encode([Prompt("?", tmp_path / "gone.png")])


# ---- completion_hidden ----


def test_completion_hidden_gives_the_logits_of_the_model(vlm, prompts, completion):
    inputs, (ids, mask) = vlm.encode(prompts), completion
    with torch.no_grad():
        hidden = vlm.completion_hidden(inputs, ids, mask)
        logits = vlm.model(
            input_ids=torch.cat([inputs.input_ids, ids], 1),
            attention_mask=torch.cat([inputs.attention_mask, mask.long()], 1),
            mm_token_type_ids=torch.cat([inputs.mm_token_type_ids, torch.zeros_like(ids)], 1),
            pixel_values=inputs.pixel_values,
            image_grid_thw=inputs.image_grid_thw,
        ).logits
    start = inputs.input_ids.shape[1] - 1
    wanted = logits[:, start : start + ids.shape[1]]
    torch.testing.assert_close((hidden @ vlm.head.weight.T)[mask], wanted[mask], **CLOSE)


def test_completion_hidden_does_not_depend_on_padding(vlm, prompts, completion):
    ids, mask = completion
    with torch.no_grad():
        together = vlm.completion_hidden(vlm.encode(prompts), ids, mask)
        for row, prompt in enumerate(prompts):
            own = slice(row, row + 1), slice(0, int(mask[row].sum()))
            alone = vlm.completion_hidden(vlm.encode([prompt]), ids[own], mask[own])
            torch.testing.assert_close(together[row][mask[row]], alone[0], **CLOSE)


def test_completion_hidden_sees_its_image_and_ignores_masked_tokens(vlm, prompts, completion):
    ids, mask = completion
    swapped = [Prompt(prompts[0].text, prompts[2].images), *prompts[1:]]
    spoiled = torch.where(mask, ids, torch.full_like(ids, vlm.model.config.image_token_id))
    with torch.no_grad():
        plain = vlm.completion_hidden(vlm.encode(prompts), ids, mask)
        other = vlm.completion_hidden(vlm.encode(swapped), ids, mask)
        masked = vlm.completion_hidden(vlm.encode(prompts), spoiled, mask)
    assert (plain[0] - other[0])[mask[0]].abs().max() > 1e-2
    torch.testing.assert_close(plain[1][mask[1]], other[1][mask[1]], **CLOSE)
    assert torch.equal(plain[mask], masked[mask])


def test_completion_hidden_reaches_every_parameter(vlm, prompts, completion):
    ids, mask = completion
    hidden = vlm.completion_hidden(vlm.encode(prompts), ids, mask)
    (hidden[mask] @ vlm.head.weight.T).logsumexp(-1).sum().backward()
    missing = [n for n, p in vlm.model.named_parameters() if p.grad is None or not p.grad.any()]
    vlm.model.zero_grad(set_to_none=True)
    assert missing == []


def test_completion_hidden_refuses_shapes_that_do_not_fit(vlm, prompts, completion):
    ids, mask = completion
    with pytest.raises(KepoDataError, match="one completion per prompt"):
        vlm.completion_hidden(vlm.encode(prompts[:2]), ids, mask)
    with pytest.raises(KepoDataError, match="equal shapes"):
        vlm.completion_hidden(vlm.encode(prompts), ids, mask[:, 1:])


# ---- Inputs ----


def test_select_and_repeat_equal_encoding_the_prompts_again(vlm, prompts, completion):
    inputs, (ids, mask) = vlm.encode(prompts), completion
    assert same(inputs.select([2, 0, 2]), vlm.encode([prompts[i] for i in (2, 0, 2)]))
    assert same(inputs.repeat(2), vlm.encode([prompts[i] for i in (0, 0, 1, 1, 2, 2)]))
    assert len(inputs.select([])) == 0
    with torch.no_grad():
        whole = vlm.completion_hidden(inputs, ids, mask)
        part = vlm.completion_hidden(inputs.select([1, 0]), ids[[1, 0]], mask[[1, 0]])
    torch.testing.assert_close(part[mask[[1, 0]]], whole[[1, 0]][mask[[1, 0]]], **CLOSE)


def test_select_and_repeat_refuse_nonsense(vlm, prompts):
    inputs = vlm.encode(prompts)
    with pytest.raises(KepoConfigError, match="bool"):
        inputs.select(torch.tensor([True, False, True]))
    with pytest.raises(KepoConfigError, match="n is 0"):
        inputs.repeat(0)


# ---- generate ----


def test_greedy_generation_is_the_argmax_of_completion_hidden(vlm, prompts):
    inputs = vlm.encode(prompts)
    ids, mask, _ = vlm.generate(inputs, SamplingParams(max_tokens=8, temperature=0.0))
    with torch.no_grad():
        logits = vlm.completion_hidden(inputs, ids, mask) @ vlm.head.weight.T
    logits[..., vlm.never_sampled()] = -torch.inf
    assert torch.equal(logits.argmax(-1)[mask], ids[mask])


def test_generate_stops_at_the_end_token_and_never_samples_placeholders(student, prompts):
    vlm = student
    torch.manual_seed(0)
    ends = list(vlm.encoder.end_ids)
    assert len(ends) == 2
    vlm.model.train()
    ids, mask, _ = vlm.generate(
        vlm.encode(prompts), SamplingParams(max_tokens=200, temperature=3.0, n=12)
    )
    assert vlm.model.training
    vlm.model.eval()
    assert ids.shape == mask.shape and ids.shape[0] == 36 and mask.dtype == torch.bool
    assert not torch.isin(ids[mask], torch.tensor(vlm.never_sampled())).any()
    assert (ids[~mask] == vlm.tokenizer.pad_token_id).all()
    ended = set()
    for row, keep in zip(ids, mask, strict=True):
        length = int(keep.sum())
        assert keep[:length].all() and length >= 1
        assert not torch.isin(row[: length - 1], torch.tensor(ends)).any()
        assert length == ids.shape[1] or row[length - 1] in ends
        ended.add(int(row[length - 1]))
    assert ended >= set(ends)  # else nothing above was tested


def test_generate_repeats_with_the_seed_and_keeps_samples_of_a_prompt_together(vlm, prompts):
    def sample(seed):
        torch.manual_seed(seed)
        return vlm.generate(
            vlm.encode(prompts), SamplingParams(max_tokens=6, temperature=1.0, n=2)
        )[0]

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    greedy, _, _ = vlm.generate(vlm.encode(prompts), SamplingParams(max_tokens=6, temperature=0.0))
    cold, _, _ = vlm.generate(
        vlm.encode(prompts), SamplingParams(max_tokens=6, temperature=1e-5, n=2)
    )
    assert torch.equal(cold, greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_p=0.0),
        dict(n=0),
    ],
)
def test_params_out_of_range_are_refused(settings):
    with pytest.raises(KepoConfigError, match=next(iter(settings))):
        SamplingParams(**{"max_tokens": 4, "temperature": 1.0, **settings})


def test_generate_refuses_seeds_that_are_not_one_per_completion(vlm, prompts):
    params = SamplingParams(n=2, max_tokens=4, temperature=1.0)
    with pytest.raises(KepoConfigError, match="seeds: 5 for 3 prompts and n=2; expected 6"):
        vlm.generate(vlm.encode(prompts), params, range(5))


def test_decode_keeps_format_tags_and_drops_control_tokens(vlm):
    texts = ["<think>3 + 5 = 8</think><answer>C</answer>", "<hint>x</hint>"]
    ids, mask = vlm.encode_completions(texts)
    assert [int(row.sum()) for row in mask] == [11, 4]  # "<hint>", "x", "</hint>", end
    assert vlm.decode(ids, mask) == texts
    assert vlm.decode(ids, torch.zeros_like(mask)) == ["", ""]


# ---- save and load ----


def test_save_and_load_round_trip(vlm, prompts, completion, tmp_path):
    vlm.save(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / name).is_file()
    again, (ids, mask) = VLM.load(tmp_path), completion
    assert same(again.encode(prompts), vlm.encode(prompts))
    with torch.no_grad():
        a = vlm.completion_hidden(vlm.encode(prompts), ids, mask)
        b = again.completion_hidden(again.encode(prompts), ids, mask)
    assert torch.equal(a, b) and torch.equal(vlm.head.weight, again.head.weight)
    assert VLM.load(tmp_path, dtype="bfloat16").head.weight.dtype == torch.bfloat16


def test_load_says_what_is_wrong(tinies, tmp_path):
    with pytest.raises(KepoCheckpointError, match=r"config\.json"):
        VLM.load(tmp_path)
    with pytest.raises(KepoConfigError, match="float99"):
        VLM.load(tinies / "qwen3", dtype="float99")
    with pytest.raises(KepoConfigError, match="huge"):
        build_tiny(tmp_path, size="huge", seed=0)
    with pytest.raises(KepoConfigError, match="qwen9"):
        build_tiny(tmp_path, size="student", seed=0, family="qwen9")
