"""min_pixels and max_pixels: what pictures become, in a run, on disk, in a plan."""

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from families import FAMILIES, pictures
from PIL import Image
from toy import TASK

from kepo.check import check_settings
from kepo.config import Config
from kepo.errors import KepoConfigError
from kepo.models.encoding import Prompt
from kepo.models.reading import encoder_of, read_config, resize_pictures
from kepo.planner.memory import Setup, peak, student_of
from kepo.planner.plan import advice
from kepo.planner.standing import GIB, Machine
from kepo.rollout.encodable import encoder_at, judge_of
from kepo.run.roles import load_policy, load_teacher
from kepo.sections import ModelsConfig, PicturesConfig


def encoder(path, **pixels):
    return encoder_at(str(path), PicturesConfig(**pixels))


def side_of(encoder) -> int:
    return encoder.image_processor.patch_size * encoder.image_processor.merge_size


def size_of(encoder, path) -> tuple[int, int]:
    """Width and height at which the model sees a picture."""
    _, height, width = encoder.encode([Prompt("?", path)]).image_grid_thw[0].tolist()
    patch = encoder.image_processor.patch_size
    return width * patch, height * patch


@pytest.mark.parametrize("name", FAMILIES)
def test_large_pictures_shrink_and_small_ones_grow_in_their_shape(tinies, tmp_path, name):
    plain = encoder(tinies / name)
    side = side_of(plain)
    sized = encoder(tinies / name, min_pixels=9 * side**2, max_pixels=36 * side**2)
    large, small, right = pictures(
        tmp_path, (16 * side, 8 * side), (2 * side, side), (4 * side, 5 * side)
    )
    for path, wide in ((large, 2.0), (small, 2.0), (right, 0.8)):
        width, height = size_of(sized, path)
        assert width % side == height % side == 0
        assert 9 * side**2 <= width * height <= 36 * side**2
        assert abs(math.log(width / height / wide)) < 0.35  # sides are whole tokens
        with Image.open(path) as picture:
            assert sized.image_tokens(*picture.size) == width * height // side**2
    assert size_of(sized, right) == (4 * side, 5 * side) == size_of(plain, right)
    assert size_of(plain, small)[0] < size_of(sized, small)[0]


def test_what_is_left_open_stays_as_the_model_has_it(tinies):
    own = dict(encoder(tinies / "qwen3").image_processor.size)
    one = encoder(tinies / "qwen3", max_pixels=own["longest_edge"] - 1)
    assert dict(one.image_processor.size) == own | {"longest_edge": own["longest_edge"] - 1}
    assert dict(encoder(tinies / "qwen3").image_processor.size) == own


def test_sizes_that_cannot_be_are_refused(tinies):
    path = str(tinies / "qwen3")
    plain = encoder_of(path, read_config(path))
    side, own = side_of(plain), dict(plain.image_processor.size)
    least, most = own["shortest_edge"], own["longest_edge"]
    for pixels, match in (
        (dict(max_pixels=side**2 - 1), rf"max_pixels={side**2 - 1} is less than the {side**2} pix"),
        (dict(max_pixels=least - 1), r"max_pixels=\d+: .*min_pixels as its preprocessor_config"),
        (dict(min_pixels=most + 1), r"min_pixels=\d+: .*max_pixels as its preprocessor_config"),
        (dict(min_pixels=5000, max_pixels=4999), "min_pixels <= max_pixels, so set both"),
    ):
        if pixels.get("max_pixels") == least - 1 < side**2:
            continue
        with pytest.raises(KepoConfigError, match=match):
            resize_pictures(plain, PicturesConfig(**pixels), path)
        assert dict(plain.image_processor.size) == own
    with pytest.raises(KepoConfigError, match="max_pixels=0; expected"):
        Config(max_pixels=0)
    plain.image_processor.size = {"height": 224, "width": 224}
    with pytest.raises(KepoConfigError, match="does not resize pictures by their number of pixels"):
        resize_pictures(plain, PicturesConfig(max_pixels=9999), path)


def test_student_teacher_and_judge_see_the_same_size_and_it_is_saved(tinies, tmp_path):
    import torch

    path = str(tinies / "qwen3")
    side = side_of(encoder(path))
    most = 16 * side**2
    config = ModelsConfig(student=path, teacher=path, min_pixels=side**2, max_pixels=most)
    device = torch.device("cpu")
    policy, teacher = load_policy(config, device), load_teacher(config, device)
    (large,) = pictures(tmp_path, (20 * side, 20 * side))
    for vlm in (policy, teacher):
        assert vlm.encode([Prompt("?", large)]).image_grid_thw.prod() * vlm.encoder.image_processor.patch_size**2 == most  # fmt: skip  # noqa: E501
    policy.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": side**2, "longest_edge": most}
    assert size_of(encoder(tmp_path / "saved"), large) == (4 * side, 4 * side)


def test_a_smaller_picture_makes_room_in_the_judges_count(tinies, tmp_path):
    """A prompt that is too long for the model's positions fits with fewer pixels."""
    from folders import change_text_config
    from quirks import write_good, write_quirks

    from kepo.data.load import load_examples

    root = write_good(write_quirks(tmp_path / "made" / "data"), tmp_path / "data")
    examples, report = load_examples(root)
    Image.new("RGB", (640, 640)).save(examples[2].images[0])
    about = sum(e.images == examples[2].images for e in examples)
    import shutil

    model = shutil.copytree(tinies / "qwen3", tmp_path / "model")
    plain = encoder(model)
    longest = max(plain.text_lengths([Prompt(TASK.messages(e)[-1]["content"]) for e in examples]))
    change_text_config(model, max_position_embeddings=longest + 8 + 40)
    off = dict(teacher=None, hint_trigger="never", gate_reward=None, distill_coef=0.0)
    config = Config(student=str(model), train_data=str(root), max_completion_length=8, **off)
    kinds = {}
    for name, pixels in (("as is", {}), ("small", dict(max_pixels=4 * side_of(plain) ** 2))):
        sized = Config(**{**vars(config), **pixels})
        kinds[name] = judge_of(sized, TASK)(examples, report, True)[1].counts()
    assert kinds == {"as is": {"prompt too long": about}, "small": {}}


# ---- the plan

MACHINE = Machine(1, 80 * GIB)


def planned(**pixels):
    off = dict(hint_trigger="never", gate_reward=None, distill_coef=0.0)
    config = Config(
        student="Qwen/Qwen3-VL-2B-Instruct",
        dtype="bfloat16",
        sharding="fsdp2",
        device="cuda",
        **off,
        **pixels,
    )
    return Setup(config, MACHINE)


@pytest.mark.parametrize(
    ("pixels", "tokens"),
    [
        ({}, 144),  # 384 x 384 in squares of 32
        (dict(max_pixels=10**6), 144),
        (dict(min_pixels=1024), 144),
        (dict(max_pixels=128 * 128), 16),
        (dict(max_pixels=1), 1),
        (dict(min_pixels=640 * 640), 400),
        (dict(min_pixels=640 * 640 + 1), 441),
        (dict(min_pixels=640 * 640, max_pixels=800 * 800), 400),
    ],
)
def test_the_plan_counts_pictures_of_that_size(pixels, tokens):
    setup = planned(**pixels)
    assert student_of(setup.config, MACHINE).default_image_tokens == tokens
    assert setup.prompts.image(student_of(setup.config, MACHINE)) == tokens


def test_the_plan_takes_less_for_smaller_pictures_and_proposes_it(tinies):
    def tiny(**pixels):
        setup = planned(**pixels)
        return setup._replace(config=replace(setup.config, student=str(tinies / "qwen3")))

    assert peak(tiny(max_pixels=128 * 128)).total < peak(tiny()).total < peak(tiny(min_pixels=640**2)).total  # fmt: skip  # noqa: E501
    changes = {change.setting for change in advice(tiny(max_pixels=300**2))}
    assert "max_pixels: 45000" in changes


def test_bounds_that_cross_are_refused_before_a_model_is_read():
    with pytest.raises(KepoConfigError, match=r"min_pixels=9 is more than max_pixels=8"):
        check_settings(planned(min_pixels=9, max_pixels=8).config)
    check_settings(planned(min_pixels=9, max_pixels=9).config)
