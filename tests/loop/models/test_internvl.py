"""InternVL: tiles and their tokens are those of transformers' own processor, and states its own."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from families import pictures
from folders import change_json

from kepo.data.images import open_rgb
from kepo.errors import KepoCheckpointError
from kepo.models import vision
from kepo.models.encoding import Prompt
from kepo.models.families.internvl import TOKENS
from kepo.models.vlm import VLM

SIZES = (64, 32), (32, 32), (40, 130), (112, 112), (100, 100)
TILES = [3, 1, 4, 5, 5]  # with the whole picture in small, if there are several


@pytest.fixture(scope="module")
def vlm(tinies) -> VLM:
    return VLM.load(tinies / "internvl")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"), *SIZES)


@pytest.fixture(scope="module")
def theirs(vlm):
    """transformers' own processor, without its part for videos."""
    from transformers import InternVLProcessor

    class Stills(InternVLProcessor):
        def __init__(self, image_processor, tokenizer, **settings):
            super().__init__(image_processor, tokenizer, **settings)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    return Stills(
        vlm.encoder.image_processor,
        vlm.tokenizer,
        image_seq_length=vlm.model.config.image_seq_length,
        chat_template=vlm.tokenizer.chat_template,
    )


def test_prompts_are_those_of_their_processor(vlm, theirs, shown):
    for paths in ([shown[0]], [shown[1], shown[2]], [shown[4], shown[3], shown[4]]):
        inputs = vlm.encode([Prompt("Which?", tuple(paths))])
        parts = [{"type": "image"} for _ in paths] + [{"type": "text", "text": "Which?"}]
        text = vlm.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        wanted = theirs(images=[open_rgb(p) for p in paths], text=text, return_tensors="pt")
        assert inputs.input_ids.tolist() == torch.as_tensor(wanted["input_ids"]).tolist()
        places = list(inputs.image_places[0])
        assert torch.equal(inputs.patches(places), wanted["pixel_values"])


def test_tokens_are_counted_without_reading_a_picture(vlm, shown):
    each = vlm.model.config.image_seq_length
    assert [vlm.encoder.image_tokens(*size) for size in SIZES] == [2 + each * n for n in TILES]
    for path, size in zip(shown, SIZES, strict=True):
        whole, text = (
            f([Prompt("?", path)])[0] for f in (vlm.encoder.lengths, vlm.encoder.text_lengths)
        )
        assert whole == text + vlm.encoder.image_tokens(*size)


def plain(vlm, inputs, ids, mask) -> dict:
    """The arguments of the model's own forward, every picture as often as it is shown."""
    followed = inputs.followed_by(ids, mask)
    positions = (followed.attention_mask.cumsum(-1) - 1).clamp(min=0)
    places = [place for places in inputs.image_places for place in places]
    return dict(
        input_ids=followed.input_ids,
        attention_mask=followed.attention_mask,
        position_ids=positions,
        pixel_values=inputs.patches(places),
    )


@pytest.fixture(scope="module")
def batch(vlm, shown):
    a, b, c, *_ = shown
    prompts = [Prompt("One", (a, c)), Prompt("None?"), Prompt("Two", b), Prompt("Three", (c, a, c))]
    return vlm.encode(prompts), *vlm.encode_completions(["<answer>C</answer>", "no", "a b c", ""])


def gradients(vlm, states) -> dict[str, torch.Tensor]:
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    vlm.model.zero_grad(set_to_none=True)
    (states * weights).sum().backward()
    found = {n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad(set_to_none=True)
    return found


def test_states_and_gradients_are_those_of_the_models_own_forward(vlm, batch):
    inputs, ids, mask = batch
    start = inputs.input_ids.shape[1] - 1
    ours = vlm.completion_hidden(inputs, ids, mask)
    own = vlm.model.model(**plain(vlm, inputs, ids, mask)).last_hidden_state[:, start:-1]
    torch.testing.assert_close(ours[mask], own[mask], rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(vlm, ours[mask]), gradients(vlm, own[mask])
    assert mine.keys() == theirs.keys() and any("vision_tower" in name for name in mine)
    whole = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * whole), name


def test_a_picture_is_encoded_once_and_in_its_place(vlm, batch, monkeypatch):
    inputs, ids, mask = batch
    met = []
    forward = vlm.model.model.vision_tower.forward
    monkeypatch.setattr(
        vlm.model.model.vision_tower,
        "forward",
        lambda **given: met.append(len(given["pixel_values"])) or forward(**given),
    )
    with torch.no_grad():
        right = vlm.completion_hidden(inputs, ids, mask)
    once = sum(TILES[:3])
    if not vision.takes_features(vlm.model):  # an older transformers: as often as it is shown
        assert met == [once + 3 + 4 + 4]
        return
    assert met == [once]
    family = vlm.family

    def swapped(features, inputs, places):
        return family.placed(features, inputs, places[::-1])

    monkeypatch.setattr(
        vision, "family_of", lambda config: type(family)(**vars(family) | {"placed": swapped})
    )
    with torch.no_grad():
        wrong = vlm.completion_hidden(inputs, ids, mask)
    assert (right - wrong)[mask].abs().max() > 1e-3


def test_marks_of_pictures_are_never_said(vlm):
    marks = vlm.tokenizer.convert_tokens_to_ids(list(TOKENS.values()))
    assert set(marks) <= set(vlm.never_sampled()) & vlm.encoder.control_ids
    assert vlm.encoder.control_tokens_in("a <img> b </img>") == ["<img>", "</img>"]


@pytest.mark.parametrize(
    "file, settings, says",
    [
        (
            "preprocessor_config.json",
            dict(size={"height": 28, "width": 28}),
            r"the vision tower image_size=\[56, 56\]",
        ),
        ("preprocessor_config.json", dict(do_resize=False), "do_resize=false; expected true"),
        ("preprocessor_config.json", dict(image_std=[0, 0, 0]), r"image_std=\(0, 0, 0\); expected"),
        (
            "preprocessor_config.json",
            dict(image_processor_type="CLIPImageProcessor"),
            "names the image processor CLIPImageProcessor; expected GotOcr2ImageProcessor",
        ),
        ("config.json", dict(image_seq_length=5), "a tile becomes 4 tokens by its image_size"),
        ("config.json", dict(image_token_id=65), "makes 0 image placeholders"),
        ("tokenizer_config.json", dict(extra_special_tokens={}), "names no start_image_token or"),
    ],
)
def test_files_of_different_models_are_refused(tinies, tmp_path, file, settings, says):
    folder = Path(shutil.copytree(tinies / "internvl", tmp_path / "model"))
    change_json(folder / file, **settings)
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(folder)
